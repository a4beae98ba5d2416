"""Argument checks of the ops, made before anything is written.

Each message names the argument, what was expected and what came.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from emd_fast.noise import LIMITS, Noise, NoiseStream

FLOATING = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Interval:
    """The finite values that an argument may have. `str` words it for an error message."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return math.isfinite(value) and above and below

    def __str__(self) -> str:
        if self.high == math.inf:
            return "finite" if self.low == -math.inf else f"{'above' if self.open_low else 'at least'} {self.low:g}"
        return f"in {'(' if self.open_low else '['}{self.low:g}, {self.high:g}{')' if self.open_high else ']'}"


FINITE = Interval()
POSITIVE = Interval(0, open_low=True)
STEP_SIZE = Interval(0, 1)
# The narrower ranges of `e_step` and of the configuration.
GAMMA_EPS = Interval(0, 1, open_low=True, open_high=True)
GAMMA_Z = Interval(0, 1, open_high=True)


def tensor(name: str, value: Tensor, *, shape: Iterable[int] | None = None, like: Tensor | None = None) -> None:
    """Checks for a float32, bfloat16 or float16 tensor of this shape, on the device of `like`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in FLOATING:
        raise TypeError(f"{name} must be float32, bfloat16 or float16, got {value.dtype}")
    if shape is not None and value.shape != (wanted := tuple(shape)):
        raise ValueError(f"{name} must have shape {wanted}, got {tuple(value.shape)}")
    if like is not None and value.device != like.device:
        raise ValueError(f"{name} must be on {like.device} as the other tensors are, got {value.device}")


def batched(name: str, value: Tensor) -> None:
    """Checks for a floating-point tensor with a batch dimension."""
    tensor(name, value)
    if value.dim() == 0:
        raise ValueError(f"{name} must have a batch dimension, got a tensor without dimensions")


def state(name: str, value: Tensor, *, like: Tensor | None = None) -> None:
    """Checks a tensor that an op updates in place: float32, contiguous, without autograd."""
    batched(name, value)
    if like is not None:
        tensor(name, value, shape=like.shape, like=like)
    if value.dtype != torch.float32:
        raise TypeError(f"{name} must be float32, got {value.dtype}")
    if not value.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tuple(value.stride())}; call .contiguous() once")
    if value.requires_grad:
        raise ValueError(f"{name} is updated in place and must not require a gradient; pass {name}.detach()")


def written_apart(written: dict[str, Tensor], read: dict[str, Tensor]) -> None:
    """Checks that no written tensor shares memory with another. Tensors that are only read may."""
    if torch.compiler.is_compiling():
        return
    spans = []
    for name, value in (*written.items(), *read.items()):
        if value.is_meta or isinstance(value, FakeTensor):
            return  # these have no memory
        spans.append((name, *_span(value)))
    for i, (name, first, last) in enumerate(spans[: len(written)]):
        for other, start, end in spans[i + 1 :]:
            if start < last and first < end:
                raise ValueError(f"{name} is updated in place and overlaps {other} in memory; each needs its own")


def _span(value: Tensor) -> tuple[int, int]:
    """Start and end address. (0, 0), which overlaps nothing, for a tensor without elements."""
    size = value.numel()
    if not size:
        return 0, 0
    if not value.is_contiguous():
        size = 1 + sum((n - 1) * stride for n, stride in zip(value.shape, value.stride(), strict=True))
    start = value.data_ptr()
    return start, start + size * value.element_size()


def per_sample(name: str, value: Tensor, like: Tensor, *, positive: bool = False, synchronize: bool = False) -> None:
    """Checks for (B,) float32 with finite values, all above 0 if `positive`.

    B is that of `like`. With `synchronize` the values of a GPU tensor are read too.
    """
    tensor(name, value, shape=like.shape[:1], like=like)
    if value.dtype != torch.float32:
        raise TypeError(f"{name} must be float32, got {value.dtype}")
    if value.requires_grad:
        raise ValueError(f"{name} must not require a gradient: the op has no derivative in it")
    _values(name, value, POSITIVE if positive else FINITE, synchronize)


def _readable(value: Tensor, synchronize: bool) -> bool:
    """Whether the values may be read: never in compiled code or during a CUDA graph capture."""
    if torch.compiler.is_compiling() or type(value) is not Tensor:
        return False
    if value.device.type == "cpu":
        return True
    capturing = value.is_cuda and torch.cuda.is_current_stream_capturing()
    return synchronize and not value.is_meta and not capturing


def _values(name: str, value: Tensor, within: Interval, synchronize: bool = False) -> None:
    if not _readable(value, synchronize) or not value.numel():
        return
    low, high = torch.aminmax(value)
    # The copies of two numbers from a GPU would synchronize twice.
    smallest, largest = (low.item(), high.item()) if value.device.type == "cpu" else torch.stack((low, high)).tolist()
    if smallest not in within or largest not in within:
        raise ValueError(f"{name} must be {within}, got values from {smallest:g} to {largest:g}")


def finite(name: str, value: Tensor) -> None:
    _values(name, value, FINITE)


def exact(integrator: str) -> bool:
    """Checks an integrator, "euler" or "exact". Returns the argument `exact` of the op schemas."""
    if integrator not in ("euler", "exact"):
        raise ValueError(f'integrator must be "euler" or "exact", got {integrator!r}')
    return integrator == "exact"


def step_size(
    value: float | Tensor,
    like: Tensor,
    *,
    name: str = "step_size",
    within: Interval = STEP_SIZE,
    synchronize: bool = False,
) -> tuple[float, Tensor | None]:
    """Checks a step size: a number, or (B,) float32, with values in the interval.

    Args:
        like: a tensor with the batch size and the device of the call.
        name: the argument's name in error messages.
        within: the permitted values.
        synchronize: reads the values of a GPU tensor too, which makes the host wait.

    Returns:
        The two arguments `step_size` and `step_size_per_sample` of the op schemas. The first is
        ignored where the second is not None.
    """
    if isinstance(value, Tensor):
        per_sample(name, value, like)
        _values(name, value, within, synchronize)
        return 0.0, value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number or a tensor, got {type(value).__name__}")
    if value not in within:
        raise ValueError(f"{name} must be {within}, got {value}")
    return float(value), None


def integer(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {value!r}")


def size(value: Iterable[int]) -> list[int]:
    result: list[int] = [value] if isinstance(value, int) else list(value)
    if not result:
        raise ValueError("size must have a batch dimension, got ()")
    for n in result:
        integer("size", n)
        if n < 0:
            raise ValueError(f"size must not be negative, got {tuple(result)}")
    return result


def dtype(name: str, value: torch.dtype) -> torch.dtype:
    if value not in FLOATING:
        raise TypeError(f"{name} must be torch.float32, torch.bfloat16 or torch.float16, got {value}")
    return value


def noise(
    value: Noise,
    stream: int,
    substep: int,
    batch: int,
    device: torch.device | None = None,
    *,
    synchronize: bool = False,
) -> Tensor:
    """Checks noise, stream and substep, and returns the state tensor.

    Numbers in the state are checked on the CPU; on a GPU only with `synchronize`.
    """
    if not isinstance(value, Noise):
        raise TypeError(f"noise must be an emd_fast.Noise, got {type(value).__name__}")
    if device is not None and value.device != device:
        raise ValueError(f"noise must be on {device} as the other tensors are, got {value.device}")
    for name, number, limit in (("stream", stream, NoiseStream.LIMIT), ("substep", substep, LIMITS["substep"])):
        integer(name, number)
        if number < 0 or number >= limit:
            raise ValueError(f"{name} must be in [0, {limit}), got {number}")
    if _readable(value.state, synchronize):
        _, _, first_sample, offset = value.state.tolist()
        if substep + offset >= LIMITS["substep"]:
            raise ValueError(f"substep must stay below 65536, got {substep} and {offset} in the noise")
        if first_sample + batch > LIMITS["first_sample"]:
            raise ValueError(f"samples must stay below 2^32, got {batch} from first_sample {first_sample}")
    return value.state
