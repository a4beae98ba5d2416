"""The noise contract against an independent implementation (helpers.philox)."""

import pytest
import torch
from helpers import (
    DTYPES,
    NOISE_ERROR,
    assert_same,
    assert_within,
    integers,
    naming,
    noise_words,
    normals,
    philox,
    shapes,
    uniforms,
)
from hypothesis import example, given
from hypothesis import strategies as st
from noise_statistics import assert_independent, assert_standard_normal, assert_uniform

from emd_fast import Noise, ops
from emd_fast.backends.reference import philox as reference
from emd_fast.noise import NoiseStream

# Known answers of Random123.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
NUMBERS = {
    "seed": st.integers(0, 2**63 - 1),
    "step": st.integers(0, 2**32 - 1),
    "first_sample": st.integers(0, 2**32 - 4),
    "substep": st.integers(0, 2**16 - 1),
    "stream": st.integers(0, 2**16 - 1),
}


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers(counter, key, words):
    assert tuple(int(w) for w in philox(counter, key)) == words
    as_tensors = [tuple(torch.tensor(n) for n in numbers) for numbers in (counter, key)]
    assert tuple(w.item() for w in reference.philox(*as_tensors)) == words


@given(size=shapes(), **NUMBERS)
@example(size=(3, 7), seed=2**63 - 1, step=2**32 - 1, first_sample=2**32 - 5, substep=2**16 - 1, stream=2**16 - 1)
@example(size=(3, 7), seed=2**32, step=0, first_sample=0, substep=0, stream=0)
def test_any_number_of_the_contract(backend, size, seed, step, first_sample, substep, stream):
    where = {"seed": seed, "step": step, "first_sample": min(first_sample, 2**32 - 5), "substep": substep}
    noise = Noise(**where)
    u, n = ops.uniform(size, noise, stream=stream), ops.normal(size, noise, stream=stream)
    assert u.dtype == n.dtype == torch.float32 and u.is_contiguous() and n.is_contiguous()
    assert_same(u, torch.from_numpy(uniforms(size, stream=stream, **where)))
    assert_within(n, normals(size, stream=stream, **where), NOISE_ERROR)


@pytest.mark.parametrize("size", [(3, 0), (2, 0, 4)])
def test_samples_without_elements(backend, size):
    assert ops.uniform(size, Noise(0), stream=0).shape == ops.normal(size, Noise(0), stream=0).shape == size


@pytest.mark.parametrize("dtype", DTYPES)
def test_reduced_precision_is_the_float32_number_rounded_once(backend, dtype):
    wide = ops.normal((3, 1001), Noise(2), stream=0)
    assert_same(ops.normal((3, 1001), Noise(2), stream=0, dtype=dtype), wide.to(dtype))


# Where the words of seed 0, stream 0 are at least 2^32 - 128, which is 2^32 as a float32: (sample, element).
@pytest.mark.parametrize(("sample", "element"), [(477, 1045), (1146, 8926), (1229, 2648), (58585, 48)])
def test_where_u_is_all_but_one(backend, sample, element):
    """As a radius of a normal number it gives almost 0, as an angle almost a full turn."""
    noise, size = Noise(0, first_sample=sample), (1, element + 4)
    assert noise_words(size, first_sample=sample)[0][0, element] >= 2**32 - 400
    assert ops.uniform(size, noise, stream=0)[0, element] == 1 - 2.0**-24
    n = ops.normal(size, noise, stream=0)[:, element - 4 :]
    assert_within(n, normals(size, first_sample=sample)[:, element - 4 :], NOISE_ERROR)


@given(size=shapes(), high=st.one_of(st.integers(1, 20), st.integers(1, 2**31)))
def test_integers_are_the_words_scaled_down(size, high):
    n = ops.integers(high, size, Noise(3, step=1), stream=8, substep=2)
    assert_same(n, torch.from_numpy(integers(high, size, seed=3, step=1, stream=8, substep=2)))


def test_all_integers_below_high_occur_equally_often():
    counts = torch.bincount(ops.integers(10, (4, 25_000), Noise(5), stream=8).flatten(), minlength=10)
    # Chi-squared with 9 degrees of freedom exceeds 33.7 with probability 1e-4.
    assert ((counts - 1e4) ** 2 / 1e4).sum() < 33.7 and len(counts) == 10


def test_the_noise_decides_the_device_and_a_size_may_be_a_list():
    assert ops.uniform((2, 3), Noise(0, device="meta"), stream=0).device.type == "meta"
    assert_same(ops.uniform(torch.Size((2, 3)), Noise(0), stream=0), ops.uniform([2, 3], Noise(0), stream=0))


@given(given=st.integers(0, 2**16 - 1), share=st.floats(0, 1))
def test_substeps_of_argument_and_noise_add_up(backend, given, share):
    argument = int(share * given)
    of_noise = Noise(3, substep=given - argument)
    whole = Noise(3, substep=given)
    for op in (ops.uniform, ops.normal):
        assert torch.equal(op((2, 5), of_noise, stream=4, substep=argument), op((2, 5), whole, stream=4))


@pytest.mark.parametrize("size", [(7, 3, 5), (7,), (7, 64)])
@pytest.mark.parametrize("parts", [[7], [1] * 7, [3, 4], [0, 5, 2]])
def test_a_split_batch_is_the_whole(backend, size, parts):
    drawn_integers = [lambda *a, **k: ops.integers(1000, *a, **k)] if backend == "reference" else []
    for op in (ops.uniform, ops.normal, *drawn_integers):
        whole = op(size, Noise(5, step=9, first_sample=100), stream=3)
        start, pieces = 100, []
        for part in parts:
            pieces.append(op((part, *size[1:]), Noise(5, step=9, first_sample=start), stream=3))
            start += part
        assert torch.equal(torch.cat(pieces), whole)


def test_elements_are_row_major_whatever_the_shape(backend):
    flat = ops.normal((2, 24), Noise(1), stream=0)
    for size in ((2, 2, 3, 4), (2, 4, 6), (2, 24, 1)):
        assert torch.equal(ops.normal(size, Noise(1), stream=0).reshape(2, 24), flat)
    assert torch.equal(ops.normal((2, 21), Noise(1), stream=0), flat[:, :21])


def test_streams_are_those_of_the_noise_contract():
    names = (
        "E_STEP_Z E_STEP_EPS LANGEVIN_EPS LANGEVIN_Z FAKE_SCORE_Z FAKE_SCORE_EPS E_STEP_TIME "
        "FAKE_SCORE_TIME CONDITION SHOWN TEACHER_NOISE TEACHER_TIME TEACHER_ORDER WEIGHTS"
    )
    assert [getattr(NoiseStream, name) for name in names.split()] == list(range(14))


def test_set_and_advance_change_the_tensor_in_place(backend):
    noise = Noise(7, step=3, first_sample=2, substep=1)
    state, where = noise.state, noise.state.data_ptr()
    noise.advance()
    noise.set(first_sample=11)
    noise.set(substep=5)
    assert noise.state is state and state.data_ptr() == where
    assert state.dtype == torch.int64 and state.tolist() == [7, 4, 11, 5]
    assert repr(noise) == "Noise(seed=7, step=4, first_sample=11, substep=5, device='cpu')"
    assert torch.equal(ops.normal((3, 4), noise, stream=1), ops.normal((3, 4), Noise(7, 4, 11, 5), stream=1))


def test_a_failed_set_changes_nothing():
    noise = Noise(7, step=3)
    with pytest.raises(ValueError, match="substep"):
        noise.set(step=9, substep=2**16)
    assert noise.state.tolist() == [7, 3, 0, 0]


@pytest.mark.parametrize(
    ("name", "limit"), [("seed", 2**63), ("step", 2**32), ("first_sample", 2**32), ("substep", 2**16)]
)
def test_numbers_outside_their_range(name, limit):
    Noise(**{"seed": 0, name: limit - 1})
    for value in (-1, limit):
        with pytest.raises(ValueError, match=naming(name)):
            Noise(**{"seed": 0, name: value})
    for value in (1.0, "1", None, True):
        with pytest.raises(TypeError, match=naming(name)):
            Noise(**{"seed": 0, name: value})


@pytest.mark.exhaustive
def test_distribution_of_16_million_draws():
    """Of one backend: all have the same uniform numbers, and the same normal ones to within the contract's error."""
    size = (256, 2**16)
    assert_standard_normal(ops.normal(size, Noise(12), stream=2))
    assert_uniform(ops.uniform(size, Noise(13), stream=2))


def test_independence():
    """Of neighbours, and of the same elements in other samples, streams, steps, substeps and seeds."""
    size = (64, 2**14)
    x = ops.normal(size, Noise(12), stream=2)
    for lag in (1, 2, 3, 4, 8):
        assert_independent(x[:, lag:], x[:, :-lag], f"lag {lag}")
    assert_independent(x[1:], x[:-1], "samples")
    for what, noise, stream in (
        ("streams", Noise(12), 3), ("steps", Noise(12, step=1), 2), ("substeps", Noise(12, substep=1), 2),
        ("seeds", Noise(13), 2), ("high words of the seed", Noise(12 + 2**32), 2),
        ("first samples", Noise(12, first_sample=64), 2),
    ):  # fmt: skip
        assert_independent(x, ops.normal(size, noise, stream=stream), what)


@pytest.mark.slow
def test_normals_stay_within_the_contract_over_millions(backend):
    size = (2, 500_000) if backend != "triton" else (2, 20_000)  # the interpreter is slow
    assert_within(ops.normal(size, Noise(8, step=1), stream=2), normals(size, seed=8, step=1, stream=2), NOISE_ERROR)
