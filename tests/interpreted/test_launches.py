"""What the Triton backend launches, and the choice of its tiles."""

import pytest
import torch
from helpers import assert_all_same, draw, per_sample, seeded

import emd_fast
from emd_fast import Noise, ops
from emd_fast.backends.triton import launch, tuning


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0), (2, 3, 0, 4)])
def test_nothing_to_do_launches_nothing(shape, launched):
    x, y, v, noise = torch.ones(shape), torch.ones(shape, requires_grad=True), torch.ones(shape[0]), Noise(0)
    with emd_fast.use_backend("triton"):
        ops.uniform(shape, noise, stream=0), ops.normal(shape, noise, stream=0)
        ops.perturb(x, v, v, noise=noise, stream=0)
        ops.langevin_eps(x.clone(), x.clone(), None, [x], v[:, None], v, v, step_size=0.1, noise=noise)
        ops.langevin_z(x.clone(), x, step_size=0.1, noise=noise)
        for loss in (ops.m_step_loss(y, x, v, v, v), ops.score_matching_loss(y, x, x, v, v, v)):
            torch.autograd.grad(loss.sum(), y)
    assert launched == []


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 4, 0), (0, 4), (2, 4, 3, 0)])
def test_no_group_norm_is_launched_over_nothing(shape, launched):
    with emd_fast.use_backend("triton"):
        ops.group_norm(torch.ones(shape, requires_grad=True), 2, torch.ones(4, requires_grad=True)).sum().backward()
    assert launched == []


@pytest.mark.parametrize(
    ("batch", "tokens", "keys", "heads"), [(0, 3, 4, 2), (2, 0, 4, 2), (2, 3, 0, 2), (2, 0, 0, 2), (2, 3, 4, 0)]
)
def test_no_attention_is_launched_over_nothing(batch, tokens, keys, heads, launched):
    q, k = (torch.ones(batch, length, heads, 8, requires_grad=True) for length in (tokens, keys))
    ops.attention(q, k, k, backend="triton").sum().backward()
    assert launched == [] and not q.grad.any() and not k.grad.any()


def test_tuning_takes_the_fastest_and_leaves_numbers_and_tensors_alone(monkeypatch):
    def seconds(call, device):
        call()
        timed.append(used[-1])
        return abs(timed[-1] - 2048) + 1  # the fastest is the one whose tile has 2048 elements

    pick, used, timed = launch.pick, [], []

    def picked(batch, sizes, *choice):
        used.append(choice[0])
        return pick(batch, sizes, *choice)

    g, noise = seeded(5), Noise(2)
    eps, drift, output = draw((3, 300), g), draw((3, 300), g), draw((3, 300), g, torch.bfloat16, "sliced")
    v, one = per_sample(3, g, 0.1, 1.0), torch.ones(1).expand(3)

    def step(substep):
        state = eps.clone(), drift.clone()
        rest = (None, [output], v[:, None], v, one)
        with emd_fast.use_backend("triton"):
            return *state, ops.langevin_eps(*state, *rest, step_size=v, noise=noise, substep=substep)

    plain = step(0)
    monkeypatch.setattr(launch, "pick", picked)
    monkeypatch.setattr(tuning, "wanted", lambda device: True)
    monkeypatch.setattr(tuning, "_seconds", seconds)
    monkeypatch.setattr(tuning, "_chosen", {})
    assert_all_same(step(0), plain)
    assert timed == [tile for tile, _ in tuning.CANDIDATES] and used[-1] == 2048
    step(1)
    assert len(timed) == len(tuning.CANDIDATES)  # another substep is measured no second time
    with emd_fast.use_backend("triton"):
        ops.m_step_loss(eps, drift, v, v, v)
    assert len(timed) == len(tuning.CANDIDATES)  # a sum depends on its tiles, which stay as they are


def test_tuning_only_where_it_is_asked_for(monkeypatch):
    gpu, capturing = torch.device("cuda", 0), False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.delenv("EMD_FAST_AUTOTUNE", raising=False)
    assert not tuning.wanted(gpu)
    monkeypatch.setenv("EMD_FAST_AUTOTUNE", "1")
    assert tuning.wanted(gpu) and not tuning.wanted(torch.device("cpu"))
    capturing = True
    assert not tuning.wanted(gpu)
