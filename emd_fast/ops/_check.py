"""The checks that every op makes before anything is written. Each message names the argument and what was expected."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from emd_fast.noise import LIMITS, Noise, NoiseStream

FLOATING = (torch.float32, torch.bfloat16, torch.float16)


def tensor(name: str, value: Tensor, *, shape: Iterable[int] | None = None, like: Tensor | None = None) -> None:
    """A float32, bfloat16 or float16 tensor of this shape, on the device of `like`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in FLOATING:
        raise TypeError(f"{name} must be float32, bfloat16 or float16, got {value.dtype}")
    if shape is not None and value.shape != (wanted := tuple(shape)):
        raise ValueError(f"{name} must have shape {wanted}, got {tuple(value.shape)}")
    if like is not None and value.device != like.device:
        raise ValueError(f"{name} must be on {like.device} as the other tensors are, got {value.device}")


def batched(name: str, value: Tensor) -> None:
    """A tensor with a batch dimension."""
    tensor(name, value)
    if value.dim() == 0:
        raise ValueError(f"{name} must have a batch dimension, got a tensor without dimensions")


def state(name: str, value: Tensor, *, like: Tensor | None = None) -> None:
    """What an op updates in place: float32, contiguous, outside of autograd."""
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
    """What is written shares no memory with anything else: two tensors that are only read may."""
    if torch.compiler.is_compiling():
        return
    spans = []
    for name, value in (*written.items(), *read.items()):
        if value.is_meta or isinstance(value, FakeTensor):
            return  # there is no memory
        spans.append((name, *_span(value)))
    for i, (name, first, last) in enumerate(spans[: len(written)]):
        for other, start, end in spans[i + 1 :]:
            if start < last and first < end:
                raise ValueError(f"{name} is updated in place and overlaps {other} in memory; each needs its own")


def _span(value: Tensor) -> tuple[int, int]:
    """Where it begins and ends in memory; (0, 0), which overlaps nothing, where it has no elements."""
    size = value.numel()
    if not size:
        return 0, 0
    if not value.is_contiguous():
        size = 1 + sum((n - 1) * stride for n, stride in zip(value.shape, value.stride(), strict=True))
    start = value.data_ptr()
    return start, start + size * value.element_size()


def per_sample(name: str, value: Tensor, like: Tensor, *, positive: bool = False) -> None:
    """(B,) float32, finite, positive where asked."""
    tensor(name, value, shape=like.shape[:1], like=like)
    if value.dtype != torch.float32:
        raise TypeError(f"{name} must be float32, got {value.dtype}")
    if value.requires_grad:
        raise ValueError(f"{name} must not require a gradient: the op has no derivative in it")
    if _readable(value):
        _values(name, value, low=0.0 if positive else -math.inf, open_low=positive)


def _readable(value: Tensor) -> bool:
    return value.device.type == "cpu" and not torch.compiler.is_compiling() and type(value) is Tensor


def _values(name: str, value: Tensor, *, low: float, high: float = math.inf, open_low: bool = False) -> None:
    if not value.numel():
        return
    low_end, high_end = torch.aminmax(value)
    smallest, largest = low_end.item(), high_end.item()
    below = smallest <= low if open_low and low > -math.inf else smallest < low
    # A NaN passes no comparison, so ask for what must hold.
    if not (math.isfinite(smallest) and math.isfinite(largest)) or below or largest > high:
        wanted = "finite" if low == -math.inf else f"{'above' if open_low else 'at least'} {low:g}"
        wanted += "" if high == math.inf else f" and at most {high:g}"
        raise ValueError(f"{name} must be {wanted}, got values from {smallest:g} to {largest:g}")


def finite(name: str, value: Tensor) -> None:
    if _readable(value):
        _values(name, value, low=-math.inf)


def step_size(value: float | Tensor, like: Tensor) -> tuple[float, Tensor | None]:
    """A number or (B,) float32 in [0, 1], as the pair that the schemas take."""
    if isinstance(value, Tensor):
        per_sample("step_size", value, like)
        if _readable(value):
            _values("step_size", value, low=0.0, high=1.0)
        return 0.0, value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"step_size must be a number or a tensor, got {type(value).__name__}")
    if not 0 <= value <= 1:
        raise ValueError(f"step_size must be in [0, 1], got {value}")
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


def noise(value: Noise, stream: int, substep: int, batch: int, device: torch.device | None = None) -> Tensor:
    """The state tensor of the noise, after a check of every number that is known without asking a device."""
    if not isinstance(value, Noise):
        raise TypeError(f"noise must be an emd_fast.Noise, got {type(value).__name__}")
    if device is not None and value.device != device:
        raise ValueError(f"noise must be on {device} as the other tensors are, got {value.device}")
    for name, number, limit in (("stream", stream, NoiseStream.LIMIT), ("substep", substep, LIMITS["substep"])):
        integer(name, number)
        if number < 0 or number >= limit:
            raise ValueError(f"{name} must be in [0, {limit}), got {number}")
    if _readable(value.state):
        _, _, first_sample, offset = value.state.tolist()
        if substep + offset >= LIMITS["substep"]:
            raise ValueError(f"substep must stay below 65536, got {substep} and {offset} in the noise")
        if first_sample + batch > LIMITS["first_sample"]:
            raise ValueError(f"samples must stay below 2^32, got {batch} from first_sample {first_sample}")
    return value.state
