"""The state of the counter-based noise generator (docs/algorithm.md, "The noise").

A random number is a pure function of the seed, the optimizer step, the global index of its sample,
the stream, the substep and its element. There is no generator object that one device could advance
further than another.
"""

from __future__ import annotations

import torch

LIMITS = {"seed": 2**63, "step": 2**32, "first_sample": 2**32, "substep": 2**16}
_SLOT = {"seed": 0, "step": 1, "first_sample": 2, "substep": 3}


class NoiseStream:
    """The purpose of a random number, one constant per use. Two uses never share a stream."""

    E_STEP_Z = 0
    E_STEP_EPS = 1
    LANGEVIN_EPS = 2
    LANGEVIN_Z = 3
    FAKE_SCORE_Z = 4
    FAKE_SCORE_EPS = 5
    E_STEP_TIME = 6
    FAKE_SCORE_TIME = 7
    CONDITION = 8
    SHOWN = 9
    TEACHER_NOISE = 10
    TEACHER_TIME = 11
    TEACHER_ORDER = 12
    WEIGHTS = 13
    RUNG = 14
    EARLIER_RUNG_Z = 15
    SIZE = 16

    LIMIT = 2**16

    @staticmethod
    def shown_substep(rung: int) -> int:
        """Substep of SHOWN for the z of a rung, counted from 0. The first has that of one call."""
        return 2**15 + rung if rung else 0


class Noise:
    """Position in the noise: seed, step, first sample and substep in one int64 tensor, `state`.

    Args:
        seed: 0 <= seed < 2^63, the key of the generator.
        step: the optimizer step, below 2^32.
        first_sample: global index of the first sample of the batch, below 2^32.
        substep: added to the `substep` argument of every op. The sum must stay below 2^16.
        device: where `state` lives. It must be the device of the tensors that the noise is for.

    `set` and `advance` update the tensor in place, so that a captured CUDA graph that reads it
    replays with new noise.

    Raises:
        TypeError: a number that is not an integer.
        ValueError: a number outside its range.
    """

    def __init__(
        self,
        seed: int,
        step: int = 0,
        first_sample: int = 0,
        substep: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        numbers = {"seed": seed, "step": step, "first_sample": first_sample, "substep": substep}
        for name, value in numbers.items():
            _check(name, value)
        self.state = torch.tensor(list(numbers.values()), dtype=torch.int64, device=device)

    def set(self, *, step: int | None = None, first_sample: int | None = None, substep: int | None = None) -> None:
        """Moves to another step, first sample or substep.

        Arguments that are None stay unchanged.
        """
        given = {"step": step, "first_sample": first_sample, "substep": substep}
        changes = {name: value for name, value in given.items() if value is not None}
        for name, value in changes.items():
            _check(name, value)
        for name, value in changes.items():
            self.state[_SLOT[name]].fill_(value)

    def advance(self) -> None:
        """Adds 1 to the step, on the device. A CUDA graph can capture this call."""
        self.state[_SLOT["step"]].add_(1)

    @property
    def device(self) -> torch.device:
        return self.state.device

    def __repr__(self) -> str:
        seed, step, first_sample, substep = self.state.tolist()
        return (
            f"Noise(seed={seed}, step={step}, first_sample={first_sample}, substep={substep}, device='{self.device}')"
        )


def _check(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if not 0 <= value < LIMITS[name]:
        raise ValueError(f"{name} must be in [0, 2^{LIMITS[name].bit_length() - 1}), got {value}")
