"""Declaration of a benchmark: cases, random inputs, contenders, bytes and FLOPs."""

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
    """One benchmark case. `dtype` is that of network tensors; state tensors are always float32."""

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
        """Bytes per element of a network tensor."""
        return DTYPES[self.dtype].itemsize


class RandomTensors:
    """Random input tensors of a case, reproducible by seed on one device."""

    def __init__(self, case: Case, seed: int) -> None:
        self.case, self.seed = case, seed
        self._generator = torch.Generator(case.device).manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers, float32, contiguous."""
        return torch.randn(shape, generator=self._generator, device=self.case.device)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=self._generator, device=self.case.device)

    def state(self) -> Tensor:
        """A tensor that an op updates in place: shape of the case, float32, contiguous."""
        return self.normal(*self.case.shape)

    def network(self) -> Tensor:
        """A network output: shape, dtype and layout of the case."""
        return self.normal(*self.case.shape).to(DTYPES[self.case.dtype], memory_format=LAYOUTS[self.case.layout])

    def per_sample(self, low: float = 0.3, high: float = 1.0) -> Tensor:
        return self.uniform(low, high, self.case.shape[0])


class Inputs(NamedTuple):
    """Keyword arguments of the op, and the output gradient of its backward pass."""

    arguments: Arguments
    cotangent: Tensor | None = None


class Traffic(NamedTuple):
    """Minimum bytes of memory traffic, as in docs/ops.md."""

    read: float
    written: float

    @property
    def total(self) -> float:
        return self.read + self.written


def _implementations(bench: Bench, device: torch.device) -> dict[str, Function | str]:
    """Returns by backend the op on that backend, or the reason why it is not available."""

    def on(backend: str) -> Function:
        def call(**arguments: Any) -> Any:
            with backends.use_backend(backend):
                return bench.op(**arguments)

        return call

    implementations: dict[str, Function | str] = {}
    for name in backends.NAMES:
        if name != "auto":
            reasons = [backends.why_not(op, name, device.type) for op in bench.ops or (bench.name,)]
            implementations[name] = next((reason for reason in reasons if reason), None) or on(name)
    return implementations


@dataclass(frozen=True)
class Bench:
    """Declaration of a benchmark. All functions take the arguments of the op by keyword.

    Attributes:
        op: the public function of emd_fast.
        inputs: makes random arguments.
        eager: plain PyTorch, out of place. It returns updated arguments, then results. It draws noise
            by torch.randn_like unless the keywords of `noises` pass it.
        exact: the reference backend on float64 arguments; returns the same as `eager`.
        traffic: the minimum memory traffic; None if bytes are not the limit.
        shapes: default shapes by device type.
        axes: names of the dimensions; those in brackets are optional.
        written: the arguments that the op updates in place.
        noises: computes the noise of the contract, by the keyword under which `eager` takes it.
        moments: for an op that returns only noise, (mean, standard deviation) of a number and of its
            square. Contenders with their own generator are checked against these.
        gradients: the arguments that the backward pass differentiates; empty for no backward pass.
        flops: FLOPs of a case, for ops that are bound by arithmetic.
        peers: implementations of other installed libraries.
        peers_draw: the noise that peers use, as in `Contender.draws`.
        ops: the names of the ops inside, if it is not one op of the same name.
        implementations: emd_fast implementations by name; see `_implementations`.
        layouts: whether NCHW and NHWC differ.
        rotates: whether calls rotate over several sets of inputs.
        captures: whether CUDA graphs apply.
        interleaves: whether the readings of all contenders are interleaved. False times each
            contender right after its verification and writes it to the file, for contenders that
            take minutes.
        verified: the case at which contenders of a case are verified, for cases whose reference in
            float64 would take minutes.
        compiles: whether torch.compile takes part.
        compiled: the contenders that torch.compile makes, which `--no-compile` leaves out.
        eager_name: the name of the eager contender.
        dtype: default dtype by device type.
        roundings: allowed error of contenders other than emd_fast, in roundings of the result dtype.
    """

    name: str
    op: Function
    inputs: Callable[[RandomTensors], Inputs]
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
    implementations: Callable[[Bench, torch.device], Mapping[str, Function | str]] = _implementations
    layouts: bool = True
    rotates: bool = True
    captures: bool = True
    interleaves: bool = True
    verified: Callable[[Case], Case] = field(default=lambda case: case)
    compiles: bool = True
    compiled: frozenset[str] = frozenset({"torch.compile"})
    eager_name: str = "eager"
    dtype: Mapping[str, str] = field(default_factory=lambda: {"cpu": "bf16", "cuda": "bf16"})
    roundings: float = 8

    def cases(
        self, shapes: list[tuple[int, ...]] | None, dtype: str | None, layout: str | None, device: torch.device
    ) -> list[Case]:
        """Returns the cases of these shapes, forward and, if differentiable, with backward.

        Raises:
            ConfigError: a shape of the wrong rank, or a layout that does not apply.
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
"""Default shapes of E-step ops and losses: one larger than the caches, one of small images."""
