"""Score difference delta = s_teacher - s_fake, affine in x_t and the raw network outputs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from emd_fast.cache.conditioning import same
from emd_fast.diffusion import ragged
from emd_fast.diffusion.denoiser import Condition, column, conditional_and_unconditional, unwrap
from emd_fast.diffusion.null_condition import null_like
from emd_fast.diffusion.rung import plain
from emd_fast.em.streams import side_by_side


class ScoreDifference:
    """Coefficients of delta at fixed times t, and the network passes that give its terms.

    Attributes:
        coefs: (B, n) float32, one column per term: x_t (only if `needs_x`), the outputs of the
            teacher, the output of the fake score.
        needs_x: whether delta has a term in x_t.

    Args:
        teacher, fake_score: Denoisers of one schedule, bare or wrapped.
        t: (B,) float32.
        cond, null_cond: conditions, as for `e_step`.
        guidance: classifier-free guidance weight of the teacher: None, a number or (B,) float32.

    Raises:
        ValueError: different schedules, or guidance without a condition or null condition.
        TypeError: a network that is not a Denoiser.
    """

    def __init__(
        self,
        teacher: Any,
        fake_score: Any,
        t: Tensor,
        cond: Condition,
        null_cond: Condition,
        guidance: float | Tensor | None,
    ) -> None:
        self.teacher, self.fake_score, self.t = teacher, fake_score, t
        inner_teacher, inner_fake_score = unwrap(teacher), unwrap(fake_score)
        self.cond, self.null_cond, self.guided = plain(cond), None, guidance is not None
        self._on_rung = cond  # a fake score may take the rung
        if self.guided:
            self.null_cond = null_like(inner_teacher.null_cond if null_cond is None else null_cond, self.cond, len(t))
        if inner_teacher.schedule != inner_fake_score.schedule:
            raise ValueError(
                "teacher and fake score must share a schedule: "
                f"{inner_teacher.schedule!r}, {inner_fake_score.schedule!r}"
            )
        a_teacher, b_teacher = inner_teacher.score_coefficients(t)
        a_fake_score, b_fake_score = inner_fake_score.score_coefficients(t)
        self.needs_x = not inner_teacher.same_form(inner_fake_score)
        guidance = self.guidance = inner_teacher.guidance_at(t, guidance)
        k_x = [a_teacher - a_fake_score] if self.needs_x else []
        # A rescaled output is no affine combination of the two outputs: it is one term.
        self.rescaled = guidance if inner_teacher.rescale is not None else None
        if guidance is None or self.rescaled is not None:
            k_teacher = [b_teacher]
        else:
            k_teacher = [b_teacher * guidance, b_teacher * (1 - guidance)]
        self.coefs = torch.stack([*k_x, *k_teacher, -b_fake_score], dim=1)

    def outputs(self, x: Tensor) -> list[Tensor]:
        """Returns the raw outputs for x_t (B, ...), in the order of the columns of `coefs`."""
        without_adapter = unwrap(self.fake_score).without_adapter
        if without_adapter is not None:
            passes = 3 if self.guided else 2
            times, cond = same(_stacked, self.t, self.cond, self.null_cond)
            with without_adapter(passes - 1, passes):
                *plain, adapted = self.fake_score(torch.cat([x] * passes), times, cond).chunk(passes)
            return [*self._combined(plain), adapted]
        teacher, fake_score = side_by_side(lambda: self._teacher(x), lambda: self.fake_score(x, self.t, self._on_rung))
        return [*teacher, fake_score]

    def at(self, x: Tensor) -> Tensor:
        """Returns delta (B, ...) float32 in plain PyTorch, with the passes that it needs."""
        return self.of(x, self.outputs(x))

    def teacher_distance(self, x0: Tensor, x: Tensor, outputs: Sequence[Tensor]) -> Tensor:
        """Returns the mean of |x0 - D_teacher(x_t)| over the elements of each sample, (B,) float32.

        Args:
            x0: (B, ...), the sample of the generator.
            x: x_t (B, ...).
            outputs: what `outputs(x)` returned.
        """
        return (x0.float() - self.denoised_by_teacher(x, outputs)).abs().flatten(1).mean(1)

    def denoised_by_teacher(self, x: Tensor, outputs: Sequence[Tensor]) -> Tensor:
        """Returns D (B, ...) float32 of the teacher, with its guidance, from what `outputs(x)` returned."""
        *teacher, _ = outputs
        c_skip, c_out = unwrap(self.teacher).coefficients(self.t)
        if len(teacher) == 1:
            output = teacher[0].float()
        else:
            conditional, unconditional = teacher
            assert self.guidance is not None
            output = unwrap(self.teacher).combined(conditional, unconditional, self.guidance)
        return column(c_skip, x) * x + column(c_out, x) * output

    def denoised_by_fake_score(self, x: Tensor, outputs: Sequence[Tensor]) -> Tensor:
        """Returns D (B, ...) float32 of the fake score, from what `outputs(x)` returned."""
        c_skip, c_out = unwrap(self.fake_score).coefficients(self.t)
        return column(c_skip, x) * x + column(c_out, x) * outputs[-1].float()

    def _teacher(self, x: Tensor) -> list[Tensor]:
        if self.guided:
            return self._combined(conditional_and_unconditional(self.teacher, x, self.t, self.cond, self.null_cond))
        return [self.teacher(x, self.t, self.cond)]

    def _combined(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """The teacher's outputs as terms of delta."""
        if self.rescaled is None:
            return list(outputs)
        conditional, unconditional = outputs
        return [unwrap(self.teacher).combined(conditional, unconditional, self.rescaled)]

    def of(self, x: Tensor, outputs: Sequence[Tensor]) -> Tensor:
        """Returns delta (B, ...) float32 in plain PyTorch, for code that uses no fused op.

        Args:
            x: x_t (B, ...).
            outputs: what `outputs(x)` returned.
        """
        terms = [*([x] if self.needs_x else []), *outputs]
        delta = torch.zeros_like(x, dtype=torch.float32)
        for k, term in zip(self.coefs.unbind(1), terms, strict=True):
            delta = delta + column(k, x) * term.float()
        return delta


def _stacked(t: Tensor, cond: Condition, null_cond: Condition) -> tuple[Tensor, Condition]:
    """Times and conditions of one pass: teacher, unconditional teacher where it is guided, fake score."""
    conds = [cond, cond] if null_cond is None else [cond, null_cond, cond]
    if cond is not None:
        cond = functools.reduce(lambda first, second: pytree.tree_map(ragged.joined, first, second), conds)
    return torch.cat([t] * len(conds)), cond
