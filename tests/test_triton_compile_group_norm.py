"""group_norm's Triton kernels compiled for GPUs that are not here, for the sizes of the networks it is for."""

import pytest
import torch
from ahead_of_time import TARGETS, compiled, launches

from emd_fast.backends.triton import groups

BF16, F32 = torch.bfloat16, torch.float32
READS, WRITES = (rf"{way}\.global\S*\.v[48]\.b32" for way in ("ld", "st"))
X_ONLY, ALL = [True] + [False] * 5, [True] * 6
# (channels, positions) with 32 groups.
ADM = [(c, p) for c in (192, 384, 576, 768, 960, 1152, 1344, 1536) for p in (4096, 1024, 256, 64)]
SD = [(c, p) for c in (320, 640, 960, 1280, 1920, 2560) for p in (4096, 1024, 256, 64)]
# In chunks, and kept whole.
REPRESENTATIVES = [(192, 4096), (192, 256)]
SMALL = ("group_norm_vectors_kernel", "group_norm_parameters_kernel")  # on (B, C) only
READ_ONLY = ("group_moments_kernel", "group_norm_backward_sums_kernel")


def calls(channels, positions, dtype, last=True, everything=True):
    """The launches of forward, of backward to x, and of the full backward."""
    side = int(positions**0.5)
    x = torch.zeros(2, channels, side, positions // side, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    w, v, m = torch.ones(channels, dtype=dtype), torch.ones(2, channels, dtype=dtype), torch.zeros(2, 32)
    vectors = (w, w, v, v, v) if everything else (w, w, None, None, None)
    found = launches("group_norm", x, 32, *vectors[:2], 1e-5, *vectors[2:], True)
    for needs in (X_ONLY, ALL) if everything else (X_ONLY,):
        found += launches("group_norm_backward", x, x, m, m, 32, *vectors, True, needs)
    return found


def check(submitted, target):
    code, name = compiled(submitted, target), submitted.kernel.__name__
    code.check()
    if name not in SMALL:
        assert code.count(READS), f"{name}: 16-byte reads"
        assert code.count(WRITES) or name in READ_ONLY, f"{name}: 16-byte writes"
    assert not code.count(r"atom\.|red\.global"), name
    return name, code


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("channels", "positions"), REPRESENTATIVES)
@pytest.mark.exhaustive
def test_channels_last_bfloat16(channels, positions, target):
    for submitted in calls(channels, positions, BF16):
        name, code = check(submitted, target)
        if name not in (*SMALL, *READ_ONLY):
            assert code.count(r"cvt\.rn\.bf16x2\.f32"), "bfloat16 is rounded to nearest"


@pytest.mark.parametrize("target", [80, 90, 100])
@pytest.mark.parametrize(
    ("channels", "positions", "dtype", "last"),
    [(192, 4096, BF16, False), (320, 256, BF16, False), (192, 1024, F32, True)],
)
@pytest.mark.exhaustive
def test_other_layouts_and_dtypes(channels, positions, dtype, last, target):
    for submitted in calls(channels, positions, dtype, last, everything=False):
        check(submitted, target)


@pytest.mark.parametrize(("channels", "positions"), [*ADM, *(s for s in SD if s not in ADM)])
@pytest.mark.exhaustive
def test_every_size_of_the_networks(channels, positions):
    for submitted in calls(channels, positions, BF16, everything=False):
        check(submitted, 90)


@pytest.mark.parametrize("channels", [320, 640, 1280])
@pytest.mark.exhaustive
def test_tokens_of_a_layer_norm(channels):
    """One group of all channels of a token, with weights in float32 (emd_fast/fusion/layer_norm.py)."""
    x, w, m = torch.zeros(64, channels, dtype=BF16), torch.ones(channels), torch.zeros(64, 1)
    found = launches("group_norm", x, 1, w, w, 1e-5, None, None, None, False)
    found += launches("group_norm_backward", x, x, m, m, 1, w, w, None, None, None, False, X_ONLY)
    assert len(found) == 2
    for submitted in found:
        check(submitted, 90)


@pytest.mark.parametrize("tensors", [1, 2])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize(("channels", "positions"), [*ADM, *SD, (6, 1), (6, 37 * 19), (24, 1), (4096, 7), (128, 2**18)])
def test_a_plan_covers_every_element_once(channels, positions, last, tensors):
    for num_groups in {n for n in (1, 2, 3, 32, channels) if channels % n == 0}:
        width = channels // num_groups
        plan = groups.pick(channels, width, positions, last, tensors)
        assert plan.block % width == 0 and plan.rows >= plan.block and plan.groups * width >= plan.block
        assert plan.chunks * plan.steps * plan.columns >= positions
        # No chunk is empty: a mean of nothing is not a number.
        assert (plan.chunks - 1) * plan.steps * plan.columns < positions
        powers = (plan.rows, plan.groups, plan.columns, plan.warps)
        assert all(n & (n - 1) == 0 for n in powers) and plan.warps <= 16
        if last and channels % 8 == 0:
            assert plan.block % 8 == 0, "blocks of whole 16-byte vectors"
        if num_groups == 32 and width >= 6:
            assert plan.rows * plan.columns * tensors <= groups._RESIDENT
            # Idle rows cost no traffic, but time.
            assert channels >= 0.5 * plan.rows * -(-channels // plan.block)
    assert not groups.pick(192, 6, 4096, last, tensors).wide and groups.pick(192, 6, 2**24, last, tensors).wide
