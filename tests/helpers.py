"""What the tests share: an independent noise generator, assertions, shapes and layouts."""

import contextlib
import math
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import emd_fast
from emd_fast.em.e_step_xz import sample_x_z
from emd_fast.em.types import LangevinSettings

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NOISE_ERROR = 5e-6  # what the noise contract allows a normal number


def philox(counter, key):
    """Philox4x32-10 as published: counter of four and key of two uint64 arrays that hold 32-bit words."""
    mask = np.uint64(0xFFFFFFFF)
    c = [np.asarray(word, dtype=np.uint64) for word in counter]
    k = [np.asarray(word, dtype=np.uint64) for word in key]
    for _ in range(10):
        # A product of two 32-bit words fits into uint64.
        p0, p1 = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(p1 >> np.uint64(32)) ^ c[1] ^ k[0], p1 & mask, (p0 >> np.uint64(32)) ^ c[3] ^ k[1], p0 & mask]
        k = [(k[0] + np.uint64(0x9E3779B9)) & mask, (k[1] + np.uint64(0xBB67AE85)) & mask]
    return c


def noise_words(size, *, seed=0, step=0, first_sample=0, stream=0, substep=0):
    """uint64 words (B, 4 * blocks), element by element, and the number of elements of a sample."""
    batch, elements = size[0], math.prod(size[1:])
    sample, block = np.meshgrid(
        np.arange(batch, dtype=np.uint64) + np.uint64(first_sample),
        np.arange(-(-elements // 4), dtype=np.uint64),
        indexing="ij",
    )
    words = philox(
        (block, sample, np.full_like(block, stream * 65536 + substep), np.full_like(block, step)),
        (seed % 2**32, seed // 2**32),
    )
    return np.stack(words, axis=-1).reshape(batch, 4 * block.shape[1]), elements


def to_uniform(words):
    u = words.astype(np.float32) * np.float32(2.0**-32) + np.float32(2.0**-33)
    return np.minimum(u, np.float32(1 - 2.0**-24))


def uniforms(size, **where):
    """float32, exactly what the contract says."""
    words, elements = noise_words(size, **where)
    return to_uniform(words)[:, :elements].reshape(size)


def normals(size, **where):
    """float64 arithmetic on the float32 uniform numbers."""
    words, elements = noise_words(size, **where)
    u = to_uniform(words).astype(np.float64).reshape(len(words), words.shape[1] // 2, 2)
    radius, angle = np.sqrt(-2 * np.log(u[..., 0])), 2 * math.pi * u[..., 1]
    n = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1).reshape(words.shape)
    return torch.from_numpy(n[:, :elements].reshape(size).copy())


def integers(high, size, **where):
    words, elements = noise_words(size, **where)
    return ((words * np.uint64(high)) >> np.uint64(32))[:, :elements].reshape(size).astype(np.int64)


def assert_within(actual: Tensor, exact: Tensor, tolerance: float | Tensor, what: str = "value") -> None:
    """|actual - exact| <= tolerance everywhere; otherwise says where it is worst, and how often it fails."""
    assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    a, e = actual.detach().double(), exact.detach().double()
    same = (a == e) | (a.isnan() & e.isnan())
    error = torch.where(same, 0.0, (a - e).abs())
    failed = ~(error <= torch.as_tensor(tolerance, dtype=torch.float64).expand_as(error))
    if failed.any():
        excess = (error - tolerance).nan_to_num(nan=math.inf).masked_fill(~failed, -math.inf)
        worst = tuple(int(i) for i in np.unravel_index(int(excess.argmax()), error.shape)) if error.dim() else ()
        raise AssertionError(
            f"{what}: {int(failed.sum())} of {failed.numel()} wrong; worst at {worst}: got {a[worst].item():.9g}, "
            f"expected {e[worst].item():.9g}, off by {error[worst].item():.3g}"
        )


def assert_as_good_as_eager(
    actual: Tensor, exact: Tensor, eager: Tensor, *, more: float = 0.0, what: str = "value"
) -> None:
    """Error against float64 at most twice that of eager PyTorch in the same dtypes plus 1e-6, plus `more` for noise.

    And two float32 units in the last place of the largest value: among few numbers eager may be right by luck.
    """
    eager_error = (eager.detach().double() - exact.double()).abs()
    finite = eager_error[torch.isfinite(eager_error)]
    worst = finite.max().item() if finite.numel() else 0.0
    largest = exact[exact.isfinite()].abs().max().item() if exact.isfinite().any() else 0.0
    assert_within(actual, exact, 2 * worst + 1e-6 + 2 * 2.0**-23 * largest + more, what)


def assert_same(actual: Tensor, expected: Tensor, what: str = "value") -> None:
    """Equal bit for bit, dtype included."""
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype}, expected {expected.dtype}"
    assert_within(actual, expected, 0.0, what)


def assert_all_same(actual, expected) -> None:
    for mine, its in zip(actual, expected, strict=True):
        assert_same(mine, its)


def assert_alike(found, expected, tolerance: float) -> None:
    """z, eps and drift of two E-steps."""
    for what in ("z", "eps", "drift"):
        if tolerance:
            assert_within(getattr(found, what), getattr(expected, what), tolerance, what)
        else:
            assert_same(getattr(found, what), getattr(expected, what), what)


def naming(named: str) -> str:
    """What a message must match that names this argument: the word itself, not a letter of another."""
    return rf"(?<!\w){named}(?!\w)" if named.isidentifier() else named


_SIZES = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 13, 16, 17, 31])


@st.composite
def shapes(draw):
    """(B, ...): an empty batch, one element, (B,) only, odd and prime sizes."""
    return (draw(st.sampled_from([0, 1, 2, 3, 5])), *draw(st.lists(_SIZES, max_size=3)))


LAYOUTS = ["contiguous", "transposed", "sliced", "expanded", "batch_last"]
dtypes = st.sampled_from(DTYPES)
layouts = st.sampled_from(LAYOUTS)
integrators = st.sampled_from(["euler", "exact"])
seeds = st.integers(0, 2**31)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """x in another layout in memory; its values too, where "expanded" makes all samples those of the first."""
    if layout == "transposed" and x.dim() > 2:
        return (
            x.transpose(1, -1).contiguous().transpose(1, -1)
        )  # of four dimensions (B, C, W, H): unusual, not channels_last
    if layout == "channels_last" and x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), float("nan"), dtype=x.dtype)
        wide[..., 1::2] = x
        return wide[..., 1::2]
    if layout == "expanded" and len(x):
        return x[:1].expand(x.shape)
    if layout == "batch_last":
        return x.movedim(0, -1).contiguous().movedim(-1, 0)
    return x


def draw(shape, generator, dtype=torch.float32, layout="contiguous", scale=1.0) -> Tensor:
    return laid_out((scale * torch.randn(shape, generator=generator)).to(dtype), layout)


def per_sample(batch, generator, low=0.05, high=2.0) -> Tensor:
    return low + (high - low) * torch.rand(batch, generator=generator)


def per_element(x: Tensor) -> Tensor:
    """(B, ...) as (B, elements), empty batches too."""
    return x.reshape(len(x), math.prod(x.shape[1:]))


def column(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.dim() - 1))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@contextlib.contextmanager
def threads(number: int):
    """So many threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def randomised(network: nn.Module, seed: int, scale: float = 1.0) -> nn.Module:
    """Every weight random, so that no two are equal by accident (as zero-initialised last layers make them)."""
    generator = seeded(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 4
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator) / math.sqrt(fan_in))
    return network


class Mlp(nn.Module):
    """network(x, t, cond) on (B, d), with or without labels."""

    def __init__(self, dimension: int = 3, seed: int = 0, classes: int = 0, width: int = 16) -> None:
        super().__init__()
        self.first = nn.Linear(dimension + 1, width)
        self.last = nn.Linear(width, dimension)
        self.label = nn.Embedding(classes, width) if classes else None
        randomised(self, seed)

    def forward(self, x, t, cond=None):
        hidden = self.first(torch.cat([x, t[:, None].to(x.dtype)], dim=1))
        if self.label is not None:
            hidden = hidden + self.label(cond["label"] if isinstance(cond, dict) else cond)
        return self.last(torch.tanh(hidden))


def e_step_xz(generator, teacher, fake_score, z, eps, t, *, cond=None, **settings):
    """The ablation, with the arguments of emd_fast.e_step."""
    return sample_x_z((generator, teacher, fake_score), z, eps, t, cond, LangevinSettings(**settings))


def compiled_flops():
    """A backend of torch.compile that runs graphs as they are, and the operations of forward and backward ones."""
    from torch._dynamo.backends.common import aot_autograd

    counted = {"forward": 0, "backward": 0}

    def counting(name):
        def count(graph, example_inputs):
            for node in graph.graph.nodes:
                packet = getattr(node.target, "overloadpacket", None)
                if packet in flop_registry:
                    values, keywords = torch.fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
                    counted[name] += flop_registry[packet](*values, **keywords, out_val=node.meta["val"])
            return graph.forward

        return count

    return aot_autograd(fw_compiler=counting("forward"), bw_compiler=counting("backward")), counted


class FlopCount(TorchDispatchMode):
    """Operations as FlopCounterMode counts them, without its account by module, which autograd.grad does not bear."""

    def __init__(self, without=()) -> None:
        super().__init__()
        self.total, self.without = 0, without

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry and func._overloadpacket not in self.without:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


class HostReads(TorchDispatchMode):
    """Tells `note` the file of emd_fast that asks for the value of a tensor, which on a GPU makes the host wait.

    Not those that look at values of CPU tensors alone: schedules.py and ops/_check.py.
    """

    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__()
        self.note = note

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.__name__.startswith(("_local_scalar_dense", "equal", "is_nonzero", "nonzero")):
            self.asked()
        return func(*args, **(kwargs or {}))

    def asked(self) -> None:
        # A mode that counts operations may stand between whoever asks and the tensor.
        frames = [f.filename for f in traceback.extract_stack() if f.name != "__torch_dispatch__"]
        ours = [path for path in map(Path, frames) if path.is_relative_to(Path(emd_fast.__file__).parent)]
        if ours and ours[-1].name not in ("schedules.py", "_check.py"):
            self.note(ours[-1].name)
