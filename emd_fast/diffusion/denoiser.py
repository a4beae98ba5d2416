"""Wraps any network as an affine score.

F is the raw output of the network, D = c_skip x_t + c_out F the denoised image, and
s = a x_t + b F the score. docs/algorithm.md has the table of coefficients.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from emd_fast.cache.conditioning import same
from emd_fast.cache.weights import autocast_dtype
from emd_fast.diffusion import ragged
from emd_fast.diffusion.null_condition import null_like
from emd_fast.diffusion.rung import given, plain
from emd_fast.diffusion.schedules import Schedule

Pair = tuple[Tensor, Tensor]
Condition = Any  # None, a tensor, or any pytree of tensors batched on dimension 0


class _Form:
    """Coefficients of one parametrization as functions of alpha and sigma.

    (a, b) are closed forms, because the general formula (alpha D - x_t) / sigma^2 cancels in
    float32.

    Args:
        denoised: (alpha, sigma) -> (c_skip, c_out).
        score: (alpha, sigma) -> (a, b).
        holds: (alpha, sigma) -> a tensor that is 0 for schedules of this parametrization. None if
            any schedule fits.
        needs: the condition of `holds` in words, for error messages.
    """

    def __init__(
        self,
        denoised: Callable[[Tensor, Tensor], Pair],
        score: Callable[[Tensor, Tensor], Pair],
        holds: Callable[[Tensor, Tensor], Tensor] | None = None,
        needs: str = "",
    ) -> None:
        self.denoised, self.score, self.holds, self.needs = denoised, score, holds, needs


def _edm(sd: float) -> _Form:
    return _Form(
        lambda alpha, sigma: (sd**2 / (sigma**2 + sd**2), sigma * sd * torch.rsqrt(sigma**2 + sd**2)),
        lambda alpha, sigma: (-1 / (sigma**2 + sd**2), sd / sigma * torch.rsqrt(sigma**2 + sd**2)),
        lambda alpha, sigma: alpha - 1,
        "alpha = 1",
    )


_FORMS = {
    "eps": _Form(
        lambda alpha, sigma: (1 / alpha, -sigma / alpha),
        lambda alpha, sigma: (torch.zeros_like(sigma), -1 / sigma),
    ),
    "x0": _Form(
        lambda alpha, sigma: (torch.zeros_like(sigma), torch.ones_like(sigma)),
        lambda alpha, sigma: (-1 / sigma**2, alpha / sigma**2),
    ),
    "v": _Form(
        lambda alpha, sigma: (alpha, -sigma),
        lambda alpha, sigma: (-torch.ones_like(sigma), -alpha / sigma),
        lambda alpha, sigma: alpha**2 + sigma**2 - 1,
        "alpha^2 + sigma^2 = 1",
    ),
    "flow": _Form(
        lambda alpha, sigma: (torch.ones_like(sigma), -sigma),
        lambda alpha, sigma: (-1 / sigma, -alpha / sigma),
        lambda alpha, sigma: alpha + sigma - 1,
        "alpha = 1 - t, sigma = t",
    ),
}
PARAMETRIZATIONS = (*_FORMS, "edm")


def _identity(t: Tensor) -> Tensor:
    return t


def column(values: Tensor, like: Tensor) -> Tensor:
    """Reshapes values (B,) to broadcast against `like` (B, ...)."""
    return values.reshape(-1, *[1] * (like.dim() - 1))


class Denoiser(nn.Module):
    """A network with its noise schedule and the parametrization of its output.

    The network is called as `network(c_in(t) * x_t, c_noise(t), cond)`. The first argument has the
    dtype of the network's parameters.

    Args:
        network: a module or function.
        schedule: alpha, sigma and log-SNR as functions of t.
        parametrization: kind of the output: "eps", "x0", "v", "flow" (eps - x) or "edm".
        sigma_data: standard deviation of the data. "edm" requires it; the others refuse it.
        c_in, c_noise: functions of t (B,) float32. The defaults are 1 and t. For "edm" they are
            1 / sqrt(sigma^2 + sigma_data^2) and log(sigma) / 4.
        output: converts the return value of the network to F (B, ...), the shape of x_t. Examples
            are a function that takes an attribute, drops channels, or changes the sign.
        sample_shape: shape of one sample, without the batch.
        other_shapes: further shapes of a sample. A run draws one of all shapes for each step.
        null_cond: the unconditional condition for guidance: a pytree like cond, with size 1 or B
            in dimension 0, or an int for labels. Dimension 1 may have another size if a bool tensor
            of the condition (B, tokens) is a mask; the shorter one is padded with zeros.
        rescale: changes the guided output: (guided, conditional) -> F, float32 each.

    Raises:
        ValueError: an unknown parametrization, one that does not fit the schedule, or sigma_data
            that is missing, refused or not positive.
        TypeError: `schedule` lacks members of a schedule.
    """

    def __init__(
        self,
        network: Callable[..., Any],
        schedule: Schedule,
        parametrization: str,
        *,
        sigma_data: float | None = None,
        c_in: Callable[[Tensor], Tensor] | None = None,
        c_noise: Callable[[Tensor], Tensor] | None = None,
        output: Callable[[Any], Tensor] | None = None,
        sample_shape: Sequence[int] | None = None,
        other_shapes: Sequence[Sequence[int]] = (),
        null_cond: Condition = None,
        rescale: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        if parametrization not in PARAMETRIZATIONS:
            raise ValueError(f"parametrization must be one of {', '.join(PARAMETRIZATIONS)}, got {parametrization!r}")
        if (parametrization == "edm") != (sigma_data is not None):
            raise ValueError("sigma_data is needed for parametrization 'edm', and for it alone")
        if sigma_data is not None and not sigma_data > 0:
            raise ValueError(f"sigma_data must be positive, got {sigma_data}")
        if not isinstance(schedule, Schedule):
            raise TypeError(f"schedule must have alpha, sigma, log_snr, t_from_log_snr, t_min, t_max: got {schedule!r}")
        self.network = network
        self.schedule = schedule
        self.parametrization = parametrization
        self.sigma_data = sigma_data
        self.sample_shape = None if sample_shape is None else tuple(sample_shape)
        self.other_shapes: tuple[tuple[int, ...], ...] = tuple(map(tuple, other_shapes))
        self.null_cond = null_cond
        self.rescale = rescale
        # Origin of the weights, a path or a name. Checkpoints record it for messages.
        self.source: str | None = None
        # Dtype of the matmul and convolution weights after cast_weights, None without it.
        self.weights_dtype: torch.dtype | None = None
        # Where the network is the teacher's with an adapter, and both may be one pass: a context manager
        # (n, of) inside which the first n of `of` equal parts of a batch pass without the adapter.
        self.without_adapter: Callable[[int, int], contextlib.AbstractContextManager[None]] | None = None
        self.rungs = 0  # set by take_rungs
        self._form = _edm(sigma_data) if sigma_data is not None else _FORMS[parametrization]
        self._check_schedule()
        if sigma_data is not None:
            c_in = c_in or (lambda t: torch.rsqrt(schedule.sigma(t) ** 2 + sigma_data**2))
            c_noise = c_noise or (lambda t: torch.log(schedule.sigma(t)) / 4)
        self._c_in, self._c_noise, self._output = c_in, c_noise or _identity, output

    @classmethod
    def from_x0(cls, function: Callable[[Tensor, Tensor, Condition], Tensor], schedule: Schedule, **options: Any):
        """Makes a denoiser from a function (x_t, t, cond) that returns the denoised image D.

        Args:
            function: returns D (B, ...) for x_t (B, ...) and t (B,) float32.
            schedule: the noise schedule.
            options: keyword arguments of Denoiser.
        """
        return cls(function, schedule, "x0", **options)

    def __deepcopy__(self, memo: dict[int, Any]) -> Denoiser:
        # The copy shares the schedule, which has no state. A user's schedule may compare by
        # identity, and the copy must count as having the same schedule.
        memo[id(self.schedule)] = self.schedule
        copied = memo[id(self)] = self.__class__.__new__(self.__class__)
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def _check_schedule(self) -> None:
        if self._form.holds is None:
            return
        low, high = self.schedule.t_min, self.schedule.t_max
        t = torch.linspace(low, high, 17, device="cpu")  # the default device may be "meta"
        if self._form.holds(self.schedule.alpha(t), self.schedule.sigma(t)).abs().max() > 1e-4:
            raise ValueError(
                f"parametrization {self.parametrization!r} needs {self._form.needs}, which {self.schedule!r} has not"
            )

    def forward(self, x_t: Tensor, t: Tensor, cond: Condition = None) -> Tensor:
        """Returns F (B, ...), the raw output of the network.

        Args:
            x_t: (B, ...) floating.
            t: (B,) float32.
            cond: None, a tensor, or a pytree of tensors batched on dimension 0. Of an OnRung the
                network gets the plain condition, and the rung if it takes it.

        Raises:
            ValueError: t has another shape, or the output has another shape than x_t.
            TypeError: the output is not a tensor.
        """
        if x_t.dim() == 0 or t.shape != x_t.shape[:1]:
            raise ValueError(f"t must have shape (B,) for x_t (B, ...), got {tuple(t.shape)} for {tuple(x_t.shape)}")
        scaled = x_t if self._c_in is None else column(self._c_in(t), x_t) * x_t
        with self._products(x_t):
            inputs = scaled.to(self._input_dtype(x_t)), same(self._c_noise, t)
            returned = self.network(*inputs, *given(cond, self.takes_rung))
        output = returned if self._output is None else self._output(returned)
        if not isinstance(output, Tensor):
            raise TypeError(
                f"the network returned {type(output).__name__}, not a tensor; give Denoiser an `output` that takes "
                "it to one, for instance output=lambda returned: returned.sample"
            )
        if output.shape != x_t.shape:
            raise ValueError(
                f"the network returned shape {tuple(output.shape)} for an input of shape {tuple(x_t.shape)}; give "
                "Denoiser an `output` that takes it there, for instance output=lambda returned: returned[:, :3]"
            )
        return output

    def take_rungs(self, rungs: int) -> None:
        """Calls the network with (x, c_noise, cond, rung) where cond is an OnRung, if it has a method `take_rungs`."""
        network: Any = self.network
        if hasattr(network, "take_rungs"):
            network.take_rungs(rungs)
            self.rungs = rungs

    @property
    def takes_rung(self) -> bool:
        """Whether the network takes the rung of an OnRung."""
        return self.rungs > 0

    @property
    def has_output(self) -> bool:
        """Whether an `output` function converts the return value of the network to F."""
        return self._output is not None

    def network_inputs(self, t: Tensor) -> Pair:
        """Returns c_in, the scale of x_t, and c_noise, the noise-level input: (B,) float32 each."""
        return (torch.ones_like(t) if self._c_in is None else self._c_in(t)), self._c_noise(t)

    @property
    def shift(self) -> float | None:
        """Shift of the times at which a rectified flow is sampled; None where no scheduler says one."""
        return None

    def blank_condition(self) -> Condition:
        """Returns a condition (1, ...) on the meta device, to count the operations of a pass; None where not known."""
        return None

    def at(self, times: Sequence[float]) -> Denoiser:
        """Returns a denoiser of the networks that these times need. Most have one network for all times."""
        return self

    def guidance_at(self, t: Tensor, guidance: float | Tensor | None) -> float | Tensor | None:
        """Returns the guidance weight at t (B,) for the one that was asked for."""
        return guidance

    def shift_of(self, shape: Sequence[int]) -> float | None:
        """`shift` for samples of a shape."""
        return self.shift

    @property
    def sample_shapes(self) -> tuple[tuple[int, ...], ...]:
        """All shapes of a sample that a run draws from: sample_shape and other_shapes."""
        return () if self.sample_shape is None else (self.sample_shape, *self.other_shapes)

    def sized(self, cond: Condition, shape: Sequence[int]) -> Condition:
        """Returns a condition (B, ...) with the tensors that state the size of a sample set to that of `shape`."""
        return cond

    def heard(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns the times (B,) float32 that the network computes with for t, where it computes in `dtype`.

        A network that rounds its time to its dtype is trained at these, so that alpha and sigma are of the time that
        it is told.
        """
        return t

    def _products(self, x_t: Tensor) -> contextlib.AbstractContextManager[Any]:
        """Autocast, if matmul weights have a dtype of their own and no autocast is active."""
        if self.weights_dtype is None or autocast_dtype(x_t.device.type) is not None:
            return contextlib.nullcontext()
        return torch.autocast(x_t.device.type, self.weights_dtype)

    def _input_dtype(self, x_t: Tensor) -> torch.dtype:
        if isinstance(self.network, nn.Module):
            for parameter in self.network.parameters():
                if parameter.is_floating_point():
                    return parameter.dtype
        return x_t.dtype

    def coefficients(self, t: Tensor) -> Pair:
        """Returns (c_skip, c_out) of D = c_skip x_t + c_out F at t, each (B,) float32."""
        return self._form.denoised(self.schedule.alpha(t), self.schedule.sigma(t))

    def score_coefficients(self, t: Tensor) -> Pair:
        """Returns (a, b) of the score s = a x_t + b F at t, each (B,) float32."""
        return self._form.score(self.schedule.alpha(t), self.schedule.sigma(t))

    def guided(self, x_t: Tensor, t: Tensor, cond: Condition, guidance: float | Tensor | None) -> Tensor:
        """Returns the guided output F_u + guidance (F_c - F_u), (B, ...) float32, rescaled if there is `rescale`.

        Args:
            guidance: a number or (B,) float32. None returns F_c, from one pass.

        Raises:
            ValueError: guidance without a condition or without a null condition.
        """
        weight = self.guidance_at(t, guidance)
        if weight is None:
            return self(x_t, t, cond).float()
        return self.combined(*conditional_and_unconditional(self, x_t, t, cond, None), weight)

    def combined(self, conditional: Tensor, unconditional: Tensor, guidance: float | Tensor) -> Tensor:
        """Returns the guided output (B, ...) float32 of F_c and F_u."""
        conditional, unconditional = conditional.float(), unconditional.float()
        w = column(guidance, conditional) if isinstance(guidance, Tensor) else guidance
        guided = unconditional + w * (conditional - unconditional)
        return guided if self.rescale is None else self.rescale(guided, conditional)

    def denoise(self, x_t: Tensor, t: Tensor, cond: Condition = None, guidance: float | Tensor | None = None) -> Tensor:
        """Returns the denoised image D = c_skip x_t + c_out F, (B, ...) float32.

        Arguments and errors are those of `guided`.
        """
        c_skip, c_out = self.coefficients(t)
        return column(c_skip, x_t) * x_t + column(c_out, x_t) * self.guided(x_t, t, cond, guidance)

    def score(self, x_t: Tensor, t: Tensor, cond: Condition = None, guidance: float | Tensor | None = None) -> Tensor:
        """Returns the score s = a x_t + b F, (B, ...) float32: the gradient of log p(x_t).

        Arguments and errors are those of `guided`.
        """
        a, b = self.score_coefficients(t)
        return column(a, x_t) * x_t + column(b, x_t) * self.guided(x_t, t, cond, guidance)

    def same_form(self, other: Denoiser) -> bool:
        """Whether both have equal (a, b), so that the x terms of a score difference cancel."""
        mine, its = ((d.schedule, d.parametrization, d.sigma_data) for d in (self, other))
        return mine == its


def unwrap(network: Any) -> Denoiser:
    """Returns the Denoiser inside wrappers of DDP and torch.compile.

    Raises:
        TypeError: there is no Denoiser inside.
    """
    inner = network
    while not isinstance(inner, Denoiser):
        # `or` would call len() on a module, which a compiled module does not support.
        wrapped = getattr(inner, "module", None)
        inner = getattr(inner, "_orig_mod", None) if wrapped is None else wrapped
        if inner is None:
            raise TypeError(f"expected an emd_fast.Denoiser, bare or wrapped, got {type(network).__name__}")
    return inner


def conditional_and_unconditional(network: Any, x_t: Tensor, t: Tensor, cond: Condition, null_cond: Condition) -> Pair:
    """Returns F_c and F_u, each (B, ...), from one pass with a batch of 2 B."""
    null_cond = unwrap(network).null_cond if null_cond is None else null_cond
    return network(torch.cat([x_t, x_t]), *same(_twice, t, plain(cond), null_cond)).chunk(2)


def _twice(t: Tensor, cond: Condition, null_cond: Condition) -> tuple[Tensor, Condition]:
    null = null_like(null_cond, cond, len(t))
    return torch.cat([t, t]), pytree.tree_map(ragged.joined, cond, null)
