import pytest
import torch
from helpers import (
    NOISE_ERROR,
    assert_as_good_as_eager,
    assert_same,
    column,
    draw,
    dtypes,
    integrators,
    layouts,
    normals,
    per_sample,
    seeded,
    seeds,
    shapes,
)
from hypothesis import given
from hypothesis import strategies as st

from emd_fast import Noise, ops


def formula(z, z_grad, gamma, integrator, m):
    scale = (gamma * (2 - gamma) if integrator == "exact" else 2 * gamma) ** 0.5
    return z + gamma * (z_grad - z) + scale * m


def check(z, z_grad, step_size, where, substep=0, integrator="euler"):
    result = z.clone()
    before = z_grad.clone()
    options = {"step_size": step_size, "integrator": integrator, "noise": Noise(**where), "substep": substep}
    assert ops.langevin_z(result, z_grad, **options) is None
    m = normals(tuple(z.shape), stream=3, substep=substep, **where)
    gamma = column(step_size, z) if isinstance(step_size, torch.Tensor) else torch.tensor(step_size).float()
    exact = formula(z.double(), z_grad.double(), gamma.double(), integrator, m)
    # the noise scale is at most 1.42
    assert_as_good_as_eager(result, exact, formula(z, z_grad, gamma, integrator, m.float()), more=1.42 * NOISE_ERROR)
    assert_same(z_grad, before)


@given(
    shape=shapes(), dtype=dtypes, layout=layouts, by_sample=st.booleans(), substep=st.sampled_from([0, 3, 65535]),
    seed=seeds, integrator=integrators,
)  # fmt: skip
def test_against_float64(backend, shape, dtype, layout, by_sample, substep, seed, integrator):
    g = seeded(seed)
    step_size = per_sample(shape[0], g, 0.0, 1.0) if by_sample else torch.rand((), generator=g).item()
    z_grad = draw(shape, g, dtype, layout, scale=10)
    check(draw(shape, g), z_grad, step_size, {"seed": seed, "step": 2, "first_sample": 4}, substep, integrator)


@pytest.mark.parametrize("step_size", [0, 1, 0.0, 1.0])
def test_ends_of_the_step_size(backend, step_size):
    g = seeded(0)
    check(draw((2, 9), g), draw((2, 9), g), step_size, {"seed": 1})


def test_a_step_of_zero_changes_nothing(backend):
    z = torch.randn(3, 7)
    before = z.clone()
    ops.langevin_z(z, torch.randn(3, 7), step_size=torch.tensor([0.0, 0.5, 0.0]), noise=Noise(0))
    assert torch.equal(z[0], before[0]) and torch.equal(z[2], before[2]) and not (z[1] == before[1]).any()


def test_a_split_batch_is_the_whole(backend):
    z, z_grad = torch.randn(5, 6), torch.randn(5, 6)
    first, second = z[:2].clone(), z[2:].clone()
    ops.langevin_z(first, z_grad[:2], step_size=0.1, noise=Noise(0, first_sample=7))
    ops.langevin_z(second, z_grad[2:], step_size=0.1, noise=Noise(0, first_sample=9))
    ops.langevin_z(z, z_grad, step_size=0.1, noise=Noise(0, first_sample=7))
    assert torch.equal(torch.cat([first, second]), z)
