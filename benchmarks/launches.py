"""Counts the kernels that one Langevin step launches on a GPU, and the bytes that they read and write.

    python -m benchmarks.launches adm --batch 16
    python -m benchmarks.launches sd15 --batch 4

Needs no GPU: the step is traced on tensors without memory, in bfloat16 under autocast, with frozen
fused networks as the E-step has them. What counts is the second step of an E-step: conditions and
weights, which are computed once per E-step, are there.

Tensors of a CPU stand in for those of a GPU, because PyTorch without CUDA cannot trace a backward
pass on the latter. `_like_cuda` makes them look like those of a GPU where the library asks.
"""

from __future__ import annotations

import argparse
import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import emd_fast
from benchmarks.networks import NETWORKS
from emd_fast import Denoiser, Generator, Noise, schedules
from emd_fast.em.e_step import sample_eps_z
from emd_fast.em.types import LangevinSettings, LangevinStep


@dataclass(frozen=True)
class Kernels:
    """Kernels of one kind that an op launches.

    Attributes:
        kind: a row of the table.
        launches: their number.
        tensors: what they read and write together.
    """

    kind: str
    launches: int
    tensors: tuple[Tensor, ...]

    @property
    def bytes(self) -> int:
        return sum(_touched(tensor) * tensor.element_size() for tensor in self.tensors)


def _touched(tensor: Tensor) -> int:
    """Elements in memory: an expanded dimension is there once."""
    return math.prod(n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or not n)


@dataclass(frozen=True)
class Call:
    """A call of an op, with the name of its schema, its arguments and what it returned."""

    name: str
    args: tuple[Any, ...]
    out: Any

    @property
    def read(self) -> tuple[Tensor, ...]:
        return _tensors(self.args)

    @property
    def written(self) -> tuple[Tensor, ...]:
        return _tensors(self.out)

    def all(self, kind: str, launches: int = 1) -> tuple[Kernels, ...]:
        return (Kernels(kind, launches, (*self.read, *self.written)),)


def _tensors(value: Any) -> tuple[Tensor, ...]:
    return tuple(leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor))


# The rules ------------------------------------------------------------------------------------------------------------

Rule = Callable[[Call], tuple[Kernels, ...]]


def _of(kind: str, launches: int = 1) -> Rule:
    return lambda call: call.all(kind, launches)


def _nothing(call: Call) -> tuple[Kernels, ...]:
    return ()


def _convolution(call: Call) -> tuple[Kernels, ...]:
    x, weight, bias = call.args[:3]
    (out,) = call.written
    added = () if bias is None else (Kernels("convolution bias", 1, (out, bias, out)),)
    return Kernels("convolution", 1, (x, weight, out)), *added


def _convolution_backward(call: Call) -> tuple[Kernels, ...]:
    grad, _, weight = call.args[:3]  # of the input the shape alone
    return (Kernels("convolution", 1, (grad, weight, *call.written)),)


def _group_norm(call: Call) -> tuple[Kernels, ...]:
    from emd_fast.backends.triton import groups

    backward = call.name.endswith("_backward")
    x, count = (call.args[1], call.args[4]) if backward else call.args[:2]
    positions = math.prod(x.shape[2:])
    last = positions == 1 or not x.is_contiguous()
    plan = groups.pick(x.shape[1], x.shape[1] // count, positions, last, 2 if backward else 1)
    kind = "layer norm" if x.dim() == 2 else "group norm"
    return call.all(kind, 1 if plan.resident else 2)


def _product(call: Call) -> tuple[Kernels, ...]:
    # `* factor` of a Python number comes as a number, or as a tensor without dimensions.
    factor = call.args[1] if len(call.args) > 1 else None
    scalar = isinstance(factor, (int, float)) and factor == 1
    return call.all("factor of 1" if scalar else "elementwise")


def _cast_or_copy(call: Call) -> tuple[Kernels, ...]:
    return call.all("copy")


_VIEWS = (
    "view _unsafe_view transpose t permute split unbind slice select detach expand alias unsqueeze squeeze as_strided"
)
_WITHOUT_KERNEL = "empty empty_like empty_strided new_empty device _to_copy_none"

RULES: dict[str, tuple[Rule, str]] = {
    **{f"aten::{name}": (_nothing, "a view: no memory is touched") for name in _VIEWS.split()},
    **{f"aten::{name}": (_nothing, "memory alone") for name in _WITHOUT_KERNEL.split()},
    "prim::device": (_nothing, "a question of the host"),
    "aten::convolution": (_convolution, "cuDNN, and PyTorch adds the bias in a second kernel"),
    "emd_fast::frozen_convolution": (_convolution, "the same"),
    "aten::convolution_backward": (_convolution_backward, "to the input; weights and biases are frozen"),
    "aten::mm": (_of("product"), "cuBLAS"),
    "aten::bmm": (_of("product"), "cuBLAS"),
    "aten::addmm": (_of("product"), "cuBLAS, the bias in its epilogue"),
    "aten::_scaled_dot_product_flash_attention_for_cpu": (_of("attention"), "one kernel on a GPU too"),
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": (
        _of("attention", 3),
        "FlashAttention-2: the sums of gradient times output, the main kernel, the queries' gradient to its dtype",
    ),
    "emd_fast::group_norm": (
        _group_norm,
        "one kernel where a group fits into a program, otherwise sums and a second pass",
    ),
    "emd_fast::group_norm_backward": (_group_norm, "the same"),
    "emd_fast::residual": (_of("residual"), "one kernel"),
    "emd_fast::geglu": (_of("GEGLU"), "one kernel"),
    "emd_fast::geglu_backward": (_of("GEGLU"), "one kernel"),
    "aten::native_layer_norm": (_of("layer norm of PyTorch"), "one kernel"),
    "aten::native_layer_norm_backward": (_of("layer norm of PyTorch"), "to the input: one kernel"),
    **{f"aten::{name}": (_product, "one kernel, whatever the factor is") for name in ("mul", "mul_", "div", "div_")},
    "aten::cat": (_of("copy"), "one kernel for up to some hundred tensors"),
    "aten::stack": (_of("copy"), "one kernel"),
    "aten::clone": (_of("copy"), "one kernel"),
    "aten::copy_": (_of("copy"), "one kernel"),
    "aten::_to_copy": (_of("copy"), "a cast"),
    **{
        f"aten::{name}": (_of("elementwise"), "one kernel")
        for name in "add add_ sub neg pow rsqrt sqrt silu gelu gelu_backward zeros ones full fill_ zero_ sum".split()
    },
    **{
        f"aten::{name}": (_of("resampling"), "one kernel")
        for name in "avg_pool2d avg_pool2d_backward upsample_nearest2d upsample_nearest2d_backward".split()
    },
    **{f"emd_fast::{name}": (_of("Langevin step"), "one kernel") for name in ("perturb", "langevin_eps", "langevin_z")},
}
"""By name of the op: the kernels that it launches on a GPU, and why so many."""


class Counting(TorchDispatchMode):
    """Gathers the kernels of the ops that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Kernels] = []
        self.counts = False

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        name = op._schema.name
        if not self.counts:
            return out
        if name not in RULES:
            raise NotImplementedError(f"{name} has no rule in benchmarks/launches.py; say how many kernels it launches")
        # In the order of the schema, whether given by keyword or not.
        given = {argument.name: value for argument, value in zip(op._schema.arguments, args, strict=False)}
        given |= kwargs or {}
        ordered = tuple(given[argument.name] for argument in op._schema.arguments if argument.name in given)
        self.kernels += RULES[name][0](Call(name, ordered, out))
        return out


# The trace ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _like_cuda() -> Iterator[None]:
    """Tensors without memory say that they are on a GPU, and autocast is active on both devices."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    FakeTensor.is_cuda = property(lambda tensor: True)  # type: ignore[assignment]
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            yield
    finally:
        delattr(FakeTensor, "is_cuda")
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


def langevin_step(network: str, batch: int) -> list[Kernels]:
    """The kernels of one Langevin step of a network of benchmarks/networks.py, in their order."""
    spec = NETWORKS[network]
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    denoisers = []
    for _ in range(3):
        with mode:
            built = spec.build().requires_grad_(False)
        denoisers.append(Denoiser(built, schedules.EDM(), "edm", sigma_data=0.5, sample_shape=spec.sample_shape).eval())
    generator = Generator(denoisers[0], 2.0).eval()
    networks = generator, denoisers[1], denoisers[2]
    for one in networks:
        emd_fast.fuse(one, memory_format=torch.channels_last)
    counting = Counting()

    def after(step: LangevinStep) -> None:
        counting.counts = step.k == 0

    with mode, _like_cuda(), counting:
        z = torch.empty(batch, *spec.sample_shape)
        cond = torch.empty(batch, *spec.text) if spec.text else torch.zeros(batch, dtype=torch.int64)
        settings = LangevinSettings(2, 0.1, 0.01, Noise(0))
        sample_eps_z(networks, z, torch.empty_like(z), torch.ones(batch), cond, settings, after)
    return counting.kernels


def table(kernels: Sequence[Kernels]) -> str:
    """Launches and bytes by kind, in Markdown."""
    launches: Counter[str] = Counter()
    size: Counter[str] = Counter()
    for each in kernels:
        launches[each.kind] += each.launches
        size[each.kind] += each.bytes
    rows = [f"| {kind} | {launches[kind]:,} | {size[kind] / 1e9:.2f} GB |" for kind, _ in size.most_common()]
    total = f"| all | {launches.total():,} | {size.total() / 1e9:.2f} GB |"
    return "\n".join(["| kernels | launches | bytes |", "|---|---:|---:|", *rows, total])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.launches", description=__doc__.split("\n")[0])
    parser.add_argument("network", choices=tuple(NETWORKS))
    parser.add_argument("--batch", type=int, default=16)
    options = parser.parse_args(arguments)
    print(table(langevin_step(options.network, options.batch)))


if __name__ == "__main__":
    main()
