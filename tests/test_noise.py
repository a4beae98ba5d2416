"""The noise contract against an independent implementation (helpers.philox)."""

import numpy as np
import pytest
import torch
from helpers import NOISE_ERROR, assert_within, naming, noise_words, normals, philox, uniforms
from hypothesis import given
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


def test_first_words_through_the_public_ops(backend):
    assert (ops.uniform((1, 4), Noise(0), stream=0)[0].double() * 2**32).tolist() == pytest.approx(
        [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8], abs=256
    )


@given(size=st.sampled_from([(3, 7), (2, 3, 5, 4), (1,), (4, 1), (2, 9)]), **NUMBERS)
def test_any_number_of_the_contract(backend, size, seed, step, first_sample, substep, stream):
    where = {"seed": seed, "step": step, "first_sample": min(first_sample, 2**32 - size[0]), "substep": substep}
    noise = Noise(**where)
    u = ops.uniform(size, noise, stream=stream)
    assert u.dtype == torch.float32
    assert np.array_equal(u.numpy(), uniforms(size, stream=stream, **where))
    n = ops.normal(size, noise, stream=stream)
    assert_within(n, normals(size, stream=stream, **where), NOISE_ERROR)


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


@pytest.mark.parametrize("changed", [{"seed": 2**32}, {"seed": 1}, {"step": 1}, {"first_sample": 2}, {"substep": 1}])
def test_every_number_matters(backend, changed):
    a, b = ops.uniform((2, 64), Noise(0), stream=0), ops.uniform((2, 64), Noise(**{"seed": 0, **changed}), stream=0)
    assert not (a == b).any()


def test_streams_and_substeps_do_not_collide(backend):
    seen = torch.stack(
        [
            ops.uniform((64,), Noise(0), stream=stream, substep=substep)
            for stream in range(14)
            for substep in (0, 1, 65535)
        ]
    )
    assert len(seen.unique(dim=0)) == len(seen)


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


@pytest.mark.parametrize("draw", [ops.uniform, ops.normal, lambda *a, **k: ops.integers(7, *a, **k)])
def test_bad_arguments_of_the_drawing_ops(draw):
    for arguments, error, named in (
        ({"noise": 3}, TypeError, "noise"),
        ({"stream": -1}, ValueError, "stream"),
        ({"stream": 2**16}, ValueError, "stream"),
        ({"stream": 1.0}, TypeError, "stream"),
        ({"substep": 2**16}, ValueError, "substep"),
        ({"substep": -1}, ValueError, "substep"),
        ({"noise": Noise(0, substep=65535), "substep": 1}, ValueError, "substep"),
        ({"noise": Noise(0, first_sample=2**32 - 1)}, ValueError, "samples"),
        ({"size": ()}, ValueError, "size"),
        ({"size": (2, -1)}, ValueError, "size"),
        ({"size": (2, 1.0)}, TypeError, "size"),
    ):
        given = {"size": (2, 3), "noise": Noise(0), "stream": 0, **arguments}
        with pytest.raises(error, match=naming(named)):
            draw(given.pop("size"), given.pop("noise"), **given)


def test_numbers_of_63_bits_reach_the_key(backend):
    seed = 2**63 - 1
    assert np.array_equal(ops.uniform((2, 8), Noise(seed), stream=0).numpy(), uniforms((2, 8), seed=seed))
    assert repr(Noise(seed)) == f"Noise(seed={seed}, step=0, first_sample=0, substep=0, device='cpu')"


@pytest.mark.exhaustive
def test_distribution_of_16_million_draws():
    """Of one backend: all have the same uniform numbers, and the same normal ones to within the contract's error."""
    size = (256, 2**16)
    assert_standard_normal(ops.normal(size, Noise(12), stream=2))
    assert_uniform(ops.uniform(size, Noise(13), stream=2))


def test_independence(backend):
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
    size = (2, 500_000)
    assert_within(ops.normal(size, Noise(8, step=1), stream=2), normals(size, seed=8, step=1, stream=2), NOISE_ERROR)


def test_the_test_generator_covers_every_word():
    words, elements = noise_words((1, 6))
    assert words.shape == (1, 8) and elements == 6
