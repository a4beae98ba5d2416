"""What the file of an op declares."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from emd_fast import backends
from emd_fast.config import ConfigError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
FORWARD, BOTH = "forward", "forward+backward"

Arguments = dict[str, Any]
Function = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """One line of a result: what is run on what. `dtype` is that of network tensors; state is float32 always."""

    shape: tuple[int, ...]
    dtype: str
    layout: str
    device: torch.device
    passes: str = FORWARD

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def width(self) -> int:
        """Bytes of a network tensor's element."""
        return DTYPES[self.dtype].itemsize


class Draw:
    """Random inputs of a case, the same for the same seed on one device."""

    def __init__(self, case: Case, seed: int) -> None:
        self.case, self.seed = case, seed
        self._generator = torch.Generator(case.device).manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        """float32, contiguous."""
        return torch.randn(shape, generator=self._generator, device=self.case.device)

    def between(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=self._generator, device=self.case.device)

    def state(self) -> Tensor:
        """What an op updates in place: float32, contiguous."""
        return self.normal(*self.case.shape)

    def network(self) -> Tensor:
        """What a network returns: the dtype and layout of the case."""
        return self.normal(*self.case.shape).to(DTYPES[self.case.dtype], memory_format=LAYOUTS[self.case.layout])

    def per_sample(self, low: float = 0.3, high: float = 1.0) -> Tensor:
        return self.between(low, high, self.case.shape[0])


class Inputs(NamedTuple):
    """The op's arguments by keyword, and what its backward pass is given."""

    arguments: Arguments
    cotangent: Tensor | None = None


class Traffic(NamedTuple):
    """Bytes that cannot be avoided, as in docs/kernels.md."""

    read: float
    written: float

    @property
    def total(self) -> float:
        return self.read + self.written


def _served(bench: Bench, device: torch.device) -> dict[str, Function | str]:
    """Each backend: the op on it, or why it cannot serve here."""

    def on(backend: str) -> Function:
        def call(**arguments: Any) -> Any:
            with backends.use_backend(backend):
                return bench.op(**arguments)

        return call

    served: dict[str, Function | str] = {}
    for name in backends.NAMES:
        if name != "auto":
            reasons = [backends.why_not(op, name, device.type) for op in bench.ops or (bench.name,)]
            served[name] = next((reason for reason in reasons if reason), None) or on(name)
    return served


@dataclass(frozen=True)
class Bench:
    """One op and who else computes it. Every function here takes the op's own arguments by keyword.

    Attributes:
        op: ours, as the public function has it.
        inputs: random arguments.
        eager: what a user of PyTorch would write, out of place: returns what the op writes, then what it returns. It
            draws its noise by torch.randn_like, unless it is given by the keywords of `noises`.
        exact: the reference backend on float64 arguments; returns as `eager` does.
        traffic: the bytes model; None where bytes say nothing.
        shapes: by device type, what is run when no shape is given; `axes` names the dimensions, those in brackets may
            be left out.
        written: the arguments that the op updates in place.
        noises: the contract's noise for these arguments, by the keyword under which `eager` takes it.
        moments: for an op that returns nothing but noise: mean and standard deviation of a number, and of its square.
            PyTorch's own numbers are judged by these.
        gradients: the arguments that the backward pass differentiates in; none: there is no backward pass.
        flops: of the case, for an op that is bound by arithmetic.
        peers: other libraries that have the op and are installed.
        peers_draw: whose noise they add, as `Contender.draws` has it.
        ops: the names of the ops inside, where it is not one op of its name.
        served: see `_served`.
        layouts: whether NCHW and NHWC differ for it.
        rotates, captures, compiles: whether several sets of inputs, CUDA graphs and torch.compile make sense.
        eager_name: what to call the eager contender.
        dtype: by device type, what is run when none is given.
        roundings: how many a result of somebody else's may be off by: more for a whole network than for an op.
    """

    name: str
    op: Function
    inputs: Callable[[Draw], Inputs]
    eager: Function
    exact: Function
    traffic: Callable[[Case], Traffic] | None
    shapes: Mapping[str, tuple[tuple[int, ...], ...]]
    axes: tuple[str, ...] = ("B", "C", "[H]", "[W]")
    written: tuple[str, ...] = ()
    noises: Callable[[Arguments], dict[str, Tensor]] | None = None
    moments: tuple[tuple[float, float], tuple[float, float]] | None = None
    gradients: tuple[str, ...] = ()
    flops: Callable[[Case], float] | None = None
    peers: Callable[[Case], Mapping[str, Function]] = field(default=lambda case: {})
    peers_draw: str = "contract"
    ops: tuple[str, ...] = ()
    served: Callable[[Bench, torch.device], Mapping[str, Function | str]] = _served
    layouts: bool = True
    rotates: bool = True
    captures: bool = True
    compiles: bool = True
    eager_name: str = "eager"
    dtype: Mapping[str, str] = field(default_factory=lambda: {"cpu": "bf16", "cuda": "bf16"})
    roundings: float = 8

    def cases(
        self, shapes: list[tuple[int, ...]] | None, dtype: str | None, layout: str | None, device: torch.device
    ) -> list[Case]:
        """Every case of these shapes, forward and (where there is one) with the backward pass.

        Raises:
            ConfigError: a shape of the wrong rank, a layout that does not apply.
        """
        least, most = sum(not axis.startswith("[") for axis in self.axes), len(self.axes)
        shapes = shapes or list(self.shapes[device.type])
        for shape in shapes:
            if not least <= len(shape) <= most:
                given = ",".join(map(str, shape))
                raise ConfigError(f"{self.name} takes --shape {','.join(self.axes)}, got {len(shape)} sizes: {given}")
            if layout is not None and (not self.layouts or (layout == "nhwc" and len(shape) != 4)):
                raise ConfigError(f"{self.name} has no --layout {layout} for {','.join(map(str, shape))}")
        passes = (FORWARD, BOTH) if self.gradients else (FORWARD,)
        dtype = dtype or self.dtype[device.type]
        return [Case(shape, dtype, layout or "nchw", device, which) for shape in shapes for which in passes]


EMD_SHAPES = {"cpu": ((128, 3, 64, 64),), "cuda": ((1024, 4, 128, 128), (64, 3, 64, 64))}
"""For the ops of the E-step and the losses: beyond the caches, and a batch of small images."""
