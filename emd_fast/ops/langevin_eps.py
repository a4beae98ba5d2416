from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from emd_fast import backends
from emd_fast.noise import Noise, NoiseStream
from emd_fast.ops import _check
from emd_fast.ops._define import define

_op = define(
    "langevin_eps",
    "Tensor(a!) eps, Tensor(b!) drift, Tensor? x, Tensor[] outputs, Tensor coefs, Tensor alpha, Tensor sigma, "
    "float step_size, Tensor? step_size_per_sample, bool exact, Tensor noise, SymInt substep, "
    "ScalarType cotangent_dtype",
    "Tensor",
    fake=lambda eps, *args: eps.new_empty(eps.shape, dtype=args[-1]),
)


def langevin_eps(
    eps: Tensor,
    drift: Tensor,
    x: Tensor | None,
    outputs: Sequence[Tensor],
    coefs: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    *,
    step_size: float | Tensor,
    integrator: str = "euler",
    noise: Noise,
    substep: int = 0,
    cotangent_dtype: torch.dtype | None = None,
) -> Tensor:
    """Langevin step on eps, and on its noise-free part drift, from the raw network outputs.

        delta = coefs[:, 0] x + coefs[:, 1] outputs[0] + ...        teacher score minus fake score
        drift = (1 - step_size) drift + step_size sigma delta
        eps   = eps + step_size (sigma delta - eps) + noise_scale n

    Args:
        eps, drift: (B, ...) float32, contiguous. Both are updated in place.
        x: the shape of eps, float32, bfloat16 or float16, any strides. None where its coefficient
            is 0.
        outputs: 1 to 4 network outputs, each with the shape and dtypes of x.
        coefs: (B, 1 + len(outputs)) float32, column 0 for x; (B, len(outputs)) when x is None.
        alpha, sigma: (B,) float32.
        step_size: gamma_eps in [0, 1], a number or (B,) float32.
        integrator: "euler", with noise_scale = sqrt(2 step_size), or "exact", with
            noise_scale = sqrt(step_size (2 - step_size)).
        noise, substep: n is drawn from stream 2 at this substep.
        cotangent_dtype: dtype of the result; that of outputs[0] when None.

    Returns:
        alpha delta, (B, ...) contiguous: the cotangent of the generator's backward pass.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device. Nothing is
            written in that case.

    Each product is rounded before it is added, so that equal outputs give a delta of exactly 0.

    Source: Xie et al., "EM Distillation for One-step Diffusion Models" (arXiv 2405.16852), in the
    form of docs/algorithm.md.
    """
    _check.state("eps", eps)
    _check.state("drift", drift, like=eps)
    if not isinstance(outputs, Sequence):
        raise TypeError(f"outputs must be a sequence of tensors, got {type(outputs).__name__}")
    if not 1 <= len(outputs) <= 4:
        raise ValueError(f"outputs must be 1 to 4 tensors, got {len(outputs)}")
    read = {**({} if x is None else {"x": x}), **{f"outputs[{i}]": output for i, output in enumerate(outputs)}}
    for name, value in read.items():
        _check.tensor(name, value, shape=eps.shape, like=eps)
    _check.tensor("coefs", coefs, shape=(len(eps), len(read)), like=eps)
    if coefs.dtype != torch.float32:
        raise TypeError(f"coefs must be float32, got {coefs.dtype}")
    _check.finite("coefs", coefs)
    _check.per_sample("alpha", alpha, eps)
    _check.per_sample("sigma", sigma, eps, positive=True)
    step_size, step_size_per_sample = _check.step_size(step_size, eps)
    exact = _check.exact(integrator)
    state = _check.noise(noise, NoiseStream.LANGEVIN_EPS, substep, len(eps), eps.device)
    cotangent_dtype = _check.dtype("cotangent_dtype", outputs[0].dtype if cotangent_dtype is None else cotangent_dtype)
    others = {
        "coefs": coefs,
        "alpha": alpha,
        "sigma": sigma,
        **({} if step_size_per_sample is None else {"step_size": step_size_per_sample}),
    }
    _check.written_apart({"eps": eps, "drift": drift}, {**read, **others})
    return _op(
        eps,
        drift,
        None if x is None else x.detach(),
        [output.detach() for output in outputs],
        coefs.detach(),
        alpha,
        sigma,
        step_size,
        step_size_per_sample,
        exact,
        state,
        substep,
        cotangent_dtype,
        backends.active(),
    )
