"""Sizes of a run: one of several shapes of a sample is drawn for each step, and conditions state it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from emd_fast import ops
from emd_fast.diffusion.denoiser import Condition, Denoiser
from emd_fast.noise import Noise, NoiseStream


class Shape(NamedTuple):
    """Shapes of one z and of one x."""

    latent: tuple[int, ...]
    sample: tuple[int, ...]


class SampleSizes:
    """The size of the current step, the same on every rank and for every update of the step.

    Attributes:
        shapes: of all sizes. The first is that of samples that are shown to people.
        index: that of the current step among them.

    Args:
        teacher: knows the conditions that state a size.
        seed: of the run.
    """

    def __init__(self, shapes: Sequence[Shape], teacher: Denoiser, seed: int) -> None:
        self.shapes, self._teacher, self._seed = tuple(shapes), teacher, seed
        self._null: dict[int, tuple[Condition, Condition]] = {}
        self.at(0)

    def at(self, step: int) -> None:
        """Moves to an optimizer step: draws its size, on the CPU, because the host allocates by it."""
        noise = Noise(self._seed, step=step)
        self.index = int(ops.integers(len(self.shapes), (1,), noise, stream=NoiseStream.SIZE)) if self.several else 0

    @property
    def several(self) -> bool:
        """Whether there is more than one size."""
        return len(self.shapes) > 1

    @property
    def shape(self) -> Shape:
        """Shapes of the samples of the current step."""
        return self.shapes[self.index]

    def shown(self, sample: Sequence[int] | None) -> Shape:
        """Shapes of samples for people.

        Args:
            sample: shape of one x; that of the first size when None.

        Raises:
            ValueError: another shape than the first for a generator whose z is no x of noise.
        """
        first = self.shapes[0]
        if sample is None or tuple(sample) == first.sample:
            return first
        if first.latent != first.sample:
            raise ValueError(f"this generator makes samples of shape {first.sample} alone, got {tuple(sample)}")
        return Shape(tuple(sample), tuple(sample))

    def cond(self, cond: Condition, shape: Shape | None = None) -> Condition:
        """A condition (B, ...) for samples of a shape, that of the step when None.

        In a run of one size, conditions of that size stay as they were given.
        """
        shape = shape or self.shape
        return self._teacher.sized(cond, shape.sample) if self.several or shape != self.shapes[0] else cond

    def null_cond(self) -> Condition:
        """The teacher's null condition for the step, or None for the teacher's own as it is."""
        own = self._teacher.null_cond
        if not self.several or own is None:
            return None
        if self.index not in self._null or self._null[self.index][0] is not own:
            self._null[self.index] = own, self.cond(own)
        return self._null[self.index][1]
