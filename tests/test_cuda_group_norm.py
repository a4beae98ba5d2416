"""The CUDA kernels of group_norm, built by a C++ compiler and run on CPU tensors (tests/cuda_emulator), against
float64. The approximate instructions are off there by as much as NVIDIA permits them to be."""

import pytest
import torch
from cuda_objects import tool
from helpers import DTYPES, assert_as_good_as_eager, draw, laid_out, seeded
from test_group_norm import NAMES, by_hand, formula

from emd_fast.backends import native

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(native.why_not("normal", "cpu") is not None, reason=str(native.why_not("normal", "cpu"))),
    pytest.mark.skipif(tool("cmake") is None or tool("c++") is None, reason="no cmake or no C++ compiler"),
]

# Compute capability, and shared memory of a block and of a multiprocessor: an H200; so little that small tensors take
# clusters of blocks; no clusters; nothing resident.
H200, CLUSTERS, NO_CLUSTERS, STREAMED = "9,232448,233472", "9,6000,14000", "8,101376,102400", "8,2100,102400"
CHIPS = [H200, CLUSTERS, NO_CLUSTERS, STREAMED]
# (shape, groups): several steps of a thread and a tail, groups across vectors, one group, one channel a group, channels
# and groups that are no multiples of 8, one position, more threads than channels have vectors.
SHAPES = [
    ((2, 24, 9, 7), 4), ((1, 48, 11, 11), 3), ((2, 16, 5, 5), 1), ((2, 16, 3, 3), 16), ((3, 21, 9, 7), 3),
    ((1, 7, 40, 5), 7), ((2, 64, 1, 1), 4), ((1, 1600, 3, 2), 4), ((2, 8, 2, 3, 4), 2),
]  # fmt: skip


def case(shape, groups, dtype, names, seed=0, of_vectors=torch.float32, offset=0.0):
    g = seeded(seed)
    format = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    x = (draw(shape, g) + offset).to(dtype).contiguous(memory_format=format)
    grad = draw(shape, g, dtype).contiguous(memory_format=format)
    sizes = {"weight": shape[1:2], "bias": shape[1:2]}
    return x, grad, {name: torch.randn(sizes.get(name, shape[:2]), generator=g).to(of_vectors) for name in names}


def emulate(emulated, x, grad, groups, vectors, silu, needs):
    weight, bias, add, scale, shift = given = [vectors.get(name) for name in NAMES]
    y, mean, rstd = emulated.group_norm(x, groups, weight, bias, 1e-5, add, scale, shift, silu)
    asked = [name in needs for name in ("x", *NAMES)]
    return y, *emulated.group_norm_backward(grad, x, mean, rstd, groups, *given, silu, asked)


def check(emulated, x, grad, groups, vectors, silu=True, needs=None):
    needs = ["x", *vectors] if needs is None else needs
    y, *gradients = emulate(emulated, x, grad, groups, vectors, silu, needs)
    found = dict(zip(["y", "x", *NAMES], [y, *gradients], strict=True))
    results = []
    for run, wide in ((by_hand, True), (formula, False)):
        inputs = {k: (v.double() if wide else v).detach().requires_grad_() for k, v in {"x": x, **vectors}.items()}
        value = run(groups_x := inputs["x"], groups, **{k: v for k, v in inputs.items() if k != "x"},
                    activation="silu" if silu else None)  # fmt: skip
        leaves = [groups_x, *(inputs[name] for name in vectors)]
        of = torch.autograd.grad(value, leaves, grad.to(value.dtype))
        results.append({"y": value.detach(), **dict(zip(["x", *vectors], of, strict=True))})
    for name in ["y", *needs]:
        assert found[name].dtype == (x if name == "y" else {"x": x, **vectors}[name]).dtype
        assert_as_good_as_eager(found[name], results[0][name], results[1][name], what=name)
    for name in set(NAMES) - set(needs):
        assert not found[name].numel()
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "groups"), SHAPES)
@pytest.mark.parametrize("chip", CHIPS)
def test_value_and_gradients(emulated, monkeypatch, chip, shape, groups, dtype):
    monkeypatch.setenv("EMD_EMULATED_CHIP", chip)
    for names, silu in ((NAMES, True), (["weight", "bias"], True), (["add"], False), ([], False)):
        x, grad, vectors = case(shape, groups, dtype, names, of_vectors=dtype if len(names) == 2 else torch.float32)
        found = check(emulated, x, grad, groups, vectors, silu)
        assert found["y"].stride() == found["x"].stride() == x.stride()


@pytest.mark.parametrize("needs", [["x"], ["weight"], ["add"], ["scale", "shift"], ["x", "bias"]])
@pytest.mark.parametrize("chip", [CLUSTERS, STREAMED])
def test_only_the_gradients_that_are_asked(emulated, monkeypatch, chip, needs):
    monkeypatch.setenv("EMD_EMULATED_CHIP", chip)
    x, grad, vectors = case((2, 24, 9, 7), 4, torch.float32, NAMES)
    found = check(emulated, x, grad, 4, vectors, needs=needs)
    assert bool(found["x"].numel()) == ("x" in needs)


@pytest.mark.parametrize(("shape", "groups"), [((1, 192, 24, 24), 32), ((1, 576, 12, 12), 32), ((1, 1344, 8, 8), 32)])
def test_sizes_of_the_networks(emulated, shape, groups):
    x, grad, vectors = case(shape, groups, torch.bfloat16, NAMES)
    check(emulated, x, grad, groups, vectors)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [30.0, 3000.0])
@pytest.mark.parametrize("chip", [CLUSTERS, STREAMED])
def test_a_large_mean_does_not_swallow_the_variance(emulated, monkeypatch, chip, offset, dtype):
    monkeypatch.setenv("EMD_EMULATED_CHIP", chip)
    x, grad, vectors = case((2, 16, 16, 16), 4, dtype, ["weight"], offset=offset)
    found = check(emulated, x, grad, 4, vectors, silu=False)
    if dtype == torch.float32:
        exact = by_hand(x.double(), 4, vectors["weight"].double())
        assert (found["y"].double() - exact).abs().max() < (1e-6 * offset + 1e-5) * exact.abs().max()


def test_an_outlier_at_the_first_position_does_not_either(emulated):
    x, grad, vectors = case((1, 16, 20, 20), 4, torch.float32, [])
    x[:, :, 0, 0] = 1000.0
    check(emulated, x, grad, 4, vectors, silu=False)


@pytest.mark.parametrize("chip", CHIPS)
def test_a_sample_is_the_same_in_every_batch(emulated, monkeypatch, chip):
    monkeypatch.setenv("EMD_EMULATED_CHIP", chip)
    x, grad, vectors = case((3, 24, 9, 7), 4, torch.bfloat16, ["add", "scale"])
    whole = emulate(emulated, x, grad, 4, vectors, True, ["x", "add", "scale"])
    for i in range(3):
        one = {name: v[i : i + 1] for name, v in vectors.items()}
        alone = emulate(emulated, x[i : i + 1], grad[i : i + 1], 4, one, True, ["x", "add", "scale"])
        for all_samples, its in zip(whole, alone, strict=True):
            assert not its.numel() or torch.equal(all_samples[i : i + 1], its)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_aligned_is_read_all_the_same(emulated, dtype):
    x, grad, vectors = case((2, 24, 5, 5), 4, dtype, NAMES)
    check(emulated, moved(x), grad, 4, vectors)
    check(emulated, x, moved(grad), 4, vectors)


def moved(x):
    """The same tensor, one element behind an aligned address."""
    return torch.empty(x.numel() + 1, dtype=x.dtype)[1:].as_strided(x.shape, x.stride()).copy_(x)


def test_vectors_and_cotangents_of_any_strides(emulated):
    x, grad, vectors = case((2, 24, 5, 5), 4, torch.float32, NAMES)
    strided = {name: torch.stack([v, v + 1], -1)[..., 0] for name, v in vectors.items()}
    strided["add"] = vectors["add"][:1].expand(2, -1)
    for layout in ("contiguous", "sliced", "batch_last"):
        check(emulated, x, laid_out(grad, layout), 4, strided)


@pytest.mark.parametrize("value", [100.0, -100.0, 3e4, -3e4])
def test_large_values_of_the_activation(emulated, value):
    x, grad, vectors = case((1, 16, 4, 4), 2, torch.float32, ["bias"])
    vectors["bias"] += value
    check(emulated, x, grad, 2, vectors)


def test_nan_and_infinity_stay_in_their_sample_and_group(emulated):
    x, grad, vectors = case((2, 16, 4, 4), 2, torch.float32, [])
    x[0, 3, 1, 1] = float("nan")
    x[0, 9, 1, 1] = float("inf")
    y, of_x, *_ = emulate(emulated, x, grad, 2, vectors, True, ["x"])
    assert y[0].isnan().all() and of_x[0].isnan().all() and y[1].isfinite().all() and of_x[1].isfinite().all()


def test_constant_input(emulated):
    x, grad, vectors = case((2, 16, 4, 4), 2, torch.float32, ["bias"])
    y, of_x, *_ = emulate(emulated, torch.full_like(x, 7.0), grad, 2, vectors, False, ["x"])
    assert torch.equal(y, vectors["bias"][:, None, None].expand_as(y)) and of_x.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 16, 3, 3), (2, 16, 0, 3)])
def test_empty(emulated, shape):
    x, grad, vectors = case(shape, 2, torch.float32, ["weight", "add"])
    y, of_x, of_weight, _, of_add, *_ = emulate(emulated, x, grad, 2, vectors, True, ["x", "weight", "add"])
    assert y.shape == of_x.shape == shape and not of_weight.any() and of_add.shape == shape[:2] and not of_add.any()


def test_contiguous_tensors_are_refused(emulated):
    x = torch.randn(2, 16, 3, 3)
    with pytest.raises(RuntimeError, match="channels_last"):
        emulated.group_norm(x, 2, None, None, 1e-5, None, None, None, True)
