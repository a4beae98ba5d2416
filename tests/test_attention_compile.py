"""The attention kernels compiled for GPUs that are not here, with every choice of tiles that these can meet."""

import functools

import pytest
import torch
from ahead_of_time import compiled, launches

from emd_fast.backends.triton import attention_launch, attention_tiles

SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KB that a program may have
MATRICES = {90: r"wgmma\.mma_async", 100: r"tcgen05\.mma"}  # on the others, and where tiles are small, mma.sync
HEAD_DIMS = (40, 64, 80, 128, 160, 256)
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
# With rests the code has both loops, over whole tiles and over the last, so it needs what it would need without them
# and more: whole tiles alone are looked at once a chip. 64 and 77 take the smallest tiles.
RAGGED, WHOLE, SHORT = (1000, 1000), (1024, 1024), (64, 64)


def name(value):
    return str(value).removeprefix("torch.").replace(" ", "")


@functools.cache
def kernels(target, head_dim, dtype, lengths):
    """(name, launch, code) of what a forward and a backward pass launch, q, k and v slices of one projection."""
    tokens, keys = lengths
    q, k, v = torch.zeros(2, max(lengths), 3, 8, head_dim, dtype=dtype).unbind(2)
    q, k, v = q[:, :tokens], k[:, :keys], v[:, :keys]
    out, row = torch.zeros(q.shape, dtype=dtype), torch.zeros(2, 8, tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_launch, "_INTERPRETED", target)
        found = launches("attention", q, k, v, 0.125)
        found += launches("attention_backward", out, q, k, v, out, row, row, 0.125, [True, True, True])
    return [(described(s), s, compiled(s, target)) for s in found]


def described(submitted):
    kernel = submitted.kernel.__name__.removeprefix("attention_")
    if kernel != "to_keys_kernel" or None not in submitted.args:
        return kernel
    return f"{kernel}, {'v' if submitted.args[0] is None else 'k'}"


ORDINARY = [(t, d, BF16, RAGGED) for t in (80, 90) for d in (40, 64, 160)] + [(100, 40, BF16, RAGGED)]
EVERYTHING = [
    *((t, d, BF16, n) for t in (80, 90, 100) for d in HEAD_DIMS for n in (RAGGED, SHORT)),
    *((t, 64, BF16, WHOLE) for t in (80, 90, 100)),
    *((t, d, BF16, RAGGED) for t in (86, 89, 120) for d in (64, 256)),
    *((t, d, F32, RAGGED) for t in (80, 90, 100) for d in HEAD_DIMS),
    *((t, 80, F16, (4096, 77)) for t in (80, 90, 100)),
]
CASES = [pytest.param(*c, id="-".join(map(name, c))) for c in dict.fromkeys(ORDINARY + EVERYTHING)]


@pytest.mark.parametrize(("target", "head_dim", "dtype", "lengths"), CASES)
@pytest.mark.exhaustive
def test_machine_code(target, head_dim, dtype, lengths):
    for kernel, _, code in kernels(target, head_dim, dtype, lengths):
        code.check(SHARED[target] * 1024)
        assert code.tensor_memory <= 512 and not code.count(r"\b(?:atom|red)\."), kernel
        matrices = code.count(r"mma\.sync|wgmma\.mma_async|tcgen05\.mma")
        assert bool(matrices) == (kernel != "delta_kernel" and dtype != F32), kernel
        if matrices and kernel == "kernel" and head_dim < 256:
            assert code.count(MATRICES.get(target, r"mma\.sync")), kernel
        if dtype == F32 and kernel != "delta_kernel":
            assert code.count(r"fma\.rn") > 100 and not code.count(r"tf32"), kernel


@pytest.mark.exhaustive
def test_rows_are_read_as_vectors():
    """A head of 40 numbers has 80 bytes: 16 at a time, although no stride is a multiple of 16 numbers."""
    # As many as a tile has for each thread: 64 rows of 16 numbers are 8 bytes for each of 256.
    widest = {"kernel": "0x10", "to_queries_kernel": "0x10", "to_keys_kernel": "0x8"}
    for kernel, _, code in kernels(80, 40, BF16, RAGGED):
        assert not code.count(r"(?:ld|st)\.global\S*\.b16"), kernel
        if kernel in widest:
            assert code.count(rf"cp\.async\.c\w\.shared\.global \[[^]]*\], \[[^]]*\], {widest[kernel]}"), kernel


@pytest.fixture
def tf32_allowed():
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.exhaustive
def test_tf32_where_the_user_allows_it(tf32_allowed, monkeypatch):
    monkeypatch.setattr(attention_launch, "_INTERPRETED", 80)
    q = torch.zeros(2, 1000, 8, 64)
    (found,) = launches("attention", q, q, q, 0.125)
    code = compiled(found, 80)
    code.check(SHARED[80] * 1024)
    assert code.count(r"mma\.sync\S*tf32")


def test_no_length_asks_for_a_kernel_of_its_own():
    constants = set()
    for tokens in (1000, 1001, 4097):
        q = torch.zeros(1, tokens, 8, 40, dtype=BF16)
        (found,) = launches("attention", q, q, q, 0.125)
        constants.add(str(found.constants))
        assert {"tokens", "keys", "heads", "tiles"} <= {p.name for p in found.kernel.params if p.do_not_specialize}
    assert len(constants) == 1


@pytest.mark.parametrize("head_dim", range(1, 257))
def test_widths(head_dim):
    d0, d1 = attention_tiles.widths(head_dim)
    assert d0 >= 16 and d0 & (d0 - 1) == 0 and d0 + d1 >= head_dim
    assert d1 == 0 or (d1 >= 16 and d1 & (d1 - 1) == 0 and d0 < head_dim)
    assert d0 + d1 <= max(16, 1 << (head_dim - 1).bit_length())
    if head_dim >= 32:
        assert d0 + d1 < 2 * head_dim


def test_widths_of_real_networks():
    assert [attention_tiles.widths(d) for d in (40, 64, 80, 96, 128, 160, 256)] == [
        (32, 16), (64, 0), (64, 16), (64, 32), (128, 0), (128, 32), (256, 0)
    ]  # fmt: skip


def test_an_old_gpu_is_refused():
    with pytest.raises(RuntimeError, match="sm_75: it needs sm_80"):
        attention_tiles.pick("forward", 64, BF16, 75, 1000)
