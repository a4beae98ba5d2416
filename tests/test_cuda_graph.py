"""The E-step as a graph: what does not need a GPU. tests/test_cuda.py has the rest."""

import contextlib
import copy
import logging
import types

import pytest
import torch
from helpers import Mlp, assert_same, randomised
from streams import Streams
from torch.utils._pytree import tree_leaves

import emd_fast
from emd_fast import Denoiser, FewStepGenerator, Generator, Noise, OnRung, e_step, ops, schedules
from emd_fast.em import cuda_graph as graphs
from emd_fast.em.cuda_graph import GraphedEStep, GraphFacts, obstacle, worth_a_graph
from emd_fast.em.streams import branches, side_by_side
from emd_fast.teachers.small_unet import SmallUNet
from emd_fast.train.posterior import captures

SETTINGS = {"steps": 3, "gamma_eps": 0.2, "gamma_z": 0.05}


def networks():
    schedule, made = schedules.EDM(), [Mlp(seed=seed, classes=4) for seed in range(3)]
    *nets, other = (Denoiser(net, schedule, "edm", sigma_data=0.5, sample_shape=(3,)) for net in made)
    return Generator(other, 1.0), *nets


def arguments(batch=5, seed=0):
    noise = Noise(seed)
    z, eps = (ops.normal((batch, 3), noise, stream=s) for s in (0, 1))
    return z, eps, torch.full((batch,), 0.7) + 0.1 * seed, torch.arange(batch) % 4


def leaves(tree):
    """The tensors of a tree; an E-step has none where nothing was asked for."""
    return [leaf for leaf in tree_leaves(tree) if leaf is not None]


@pytest.fixture
def recorded(monkeypatch):
    """Graphs of the CPU: a replay runs the captured code again on the tensors that it was captured with."""
    captures = []

    def graph(run, parallel, device):
        found = run()
        captures.append(parallel)

        def replay():
            for old, new in zip(leaves(vars(found)), leaves(vars(run())), strict=True):
                old.copy_(new)

        return replay, found

    monkeypatch.setattr(graphs, "_graph", graph)
    monkeypatch.setattr(GraphedEStep, "_why_not", lambda self, z: None)
    return captures


def assert_as_eager(found, expected):
    for name, value in vars(expected).items():
        for mine, its in zip(leaves(getattr(found, name)), leaves(value), strict=True):
            assert_same(mine, its, what=name)


def test_a_replay_follows_what_changes_and_moved_weights_are_captured_anew(recorded):
    three, noise = networks(), Noise(3)
    sample, first = GraphedEStep(*three, noise=noise, **SETTINGS), None
    for step in range(4):
        noise.set(step=step)
        for parameter in (parameter for network in three for parameter in network.parameters()):
            parameter.data.mul_(1.01)
        *given, cond = arguments(seed=step)
        found = sample(*given, cond)
        assert_as_eager(found, e_step(*three, *given, cond=cond, noise=noise, **SETTINGS))
        first = first or (found, {name: value.clone() for name, value in vars(found).items() if value is not None})
    assert recorded == [True]
    parameter.data = 2 * parameter.data  # other memory
    assert_as_eager(sample(*given, cond), e_step(*three, *given, cond=cond, noise=noise, **SETTINGS))
    assert len(recorded) == 2
    for name, value in first[1].items():  # what was returned is the caller's
        assert_same(getattr(first[0], name), value)


def test_one_graph_serves_all_rungs(recorded):
    generator, *scores = networks()
    generator, noise = FewStepGenerator(generator.denoiser, (2.0, 0.5, 0.2)), Noise(3)
    sample = GraphedEStep(generator, *scores, noise=noise, **SETTINGS)
    for step, rung in enumerate(([2, 0, 1, 1, 0], [0] * 5, [2] * 5)):
        noise.set(step=step)
        *given, labels = arguments(seed=step)
        cond = OnRung(given[1].flip(0), torch.tensor(rung), labels)
        found = sample(*given, cond)
        assert_as_eager(found, e_step(generator, *scores, *given, cond=cond, noise=noise, **SETTINGS))
    assert len(recorded) == 1


def test_another_shape_or_mode_is_another_graph(recorded):
    three = networks()
    sample = GraphedEStep(*three, noise=Noise(0), steps=2)
    each = (torch.full((5,), 0.1), torch.full((5,), 0.3))
    for batch, gamma in ((5, 0.1), (5, 0.1), (40, 0.1), (5, 0.2), (5, each[0]), (5, each[1])):
        z, eps, t, cond = arguments(batch)
        found = sample(z, eps, t, cond, gamma_eps=gamma, gamma_z=0.01)
        expected = e_step(*three, z, eps, t, cond=cond, steps=2, gamma_eps=gamma, gamma_z=0.01, noise=Noise(0))
        assert_as_eager(found, expected)
    assert recorded == [True, False, True, True]


@pytest.mark.parametrize("why", ["cpu tensors have no graphs", "cannot be captured: operation not permitted"])
def test_without_a_graph_it_is_the_e_step_and_says_so_once(monkeypatch, caplog, why):
    def graph(run, parallel, device):
        raise RuntimeError("operation not permitted when stream is capturing")

    graphs._say_once.cache_clear()
    if "captured" in why:
        monkeypatch.setattr(GraphedEStep, "_why_not", lambda self, z: None)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        monkeypatch.setattr(graphs, "_graph", graph)
    three, (z, eps, t, cond) = networks(), arguments()
    sample = GraphedEStep(*three, noise=Noise(0), **SETTINGS)
    with caplog.at_level(logging.WARNING, "emd_fast"):
        found = [sample(z, eps, t, cond) for _ in range(2)][-1]
    (record,) = caplog.records
    said = record.getMessage()
    assert why in said and ("captured" in why or said == f"the E-step runs without a CUDA graph: {why}")
    assert_as_eager(found, e_step(*three, z, eps, t, cond=cond, noise=Noise(0), **SETTINGS))


def test_the_capture_is_on_the_device_of_the_tensors(monkeypatch):
    current, seen = [0], []

    @contextlib.contextmanager
    def on(device):
        outer, current[0] = current[0], device.index
        yield
        current[0] = outer

    @contextlib.contextmanager
    def capture(graph, stream, capture_error_mode):
        seen.append(("capture", stream.device))
        yield

    def stream():
        return types.SimpleNamespace(device=current[0], wait_stream=lambda other: None)

    fakes = {"device": on, "graph": capture, "Stream": stream, "current_stream": stream}
    fakes |= {"stream": contextlib.nullcontext, "CUDAGraph": lambda: types.SimpleNamespace(replay=lambda: None)}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    graphs._graph(lambda: seen.append(("run", current[0])), True, torch.device("cuda", 1))
    assert seen == [("run", 1)] * 2 + [("capture", 1), ("run", 1)] and current == [0]


@pytest.mark.parametrize(
    ("facts", "captures", "why"),
    [
        (GraphFacts("cuda", None, 1), True, "a pass of 1 samples is at most 16"),
        (GraphFacts("cuda", None, 16), True, "the host would limit it"),
        (GraphFacts("cuda", None, 17), False, "a pass of 17 samples is more than 16"),
        (GraphFacts("cuda", "the teacher is sharded", 4), False, "the teacher is sharded"),
        (GraphFacts("cpu", None, 4), False, "cpu tensors have no graphs"),
    ],
)
def test_when_a_graph_is_worth_it(facts, captures, why):
    assert (found := worth_a_graph(facts))[0] == captures and why in found[1] and "\n" not in found[1]


def test_what_cannot_be_captured(monkeypatch):
    generator, teacher, fake_score = networks()
    assert obstacle((generator, teacher, fake_score)) is None
    assert obstacle((lambda z, cond: z, teacher, fake_score)).startswith("the generator is no module")
    monkeypatch.setattr(graphs, "is_sharded", lambda network: network is fake_score)
    assert obstacle((generator, teacher, fake_score)).startswith("the fake_score is sharded")


@pytest.mark.parametrize(
    ("chosen", "change", "captured", "why"),
    [
        ("auto", {"batch_size": 16}, True, "auto: on: a pass of 16 samples"),
        ("auto", {"batch_size": 17}, False, "auto: off: a pass of 17 samples"),
        ("auto", {"batch_size": 40, "micro_batch_size": 8}, True, "auto: on: a pass of 8 samples"),
        ("auto", {"batch_size": 4, "micro_batch_size": 80}, True, "auto: on: a pass of 4 samples"),
        ("auto", {"sampling": "x_z"}, False, 'auto: off: sampling "x_z" has no graph'),
        (True, {"batch_size": 64}, True, "cuda_graph is true"),
        (False, {"batch_size": 4}, False, "cuda_graph is false"),
    ],
)
def test_what_a_trainer_captures(caplog, chosen, change, captured, why):
    config = emd_fast.EMDConfig(num_classes=4, cuda_graph=chosen, **change)
    with caplog.at_level(logging.INFO, "emd_fast"):
        found, reason = captures(config, networks(), "cuda")
    assert found == captured and why in reason
    assert (chosen == "auto") == any(why in record.getMessage() for record in caplog.records)


def test_auto_is_off_on_a_cpu():
    trainer = emd_fast.EMDTrainer(networks()[1], emd_fast.EMDConfig(num_classes=4, batch_size=4, cuda_graph="auto"))
    assert (
        not trainer.posterior.captured
        and trainer.posterior.why == "cuda_graph is auto: off: cpu tensors have no graphs"
    )


def test_step_sizes_must_come_from_somewhere():
    sample = GraphedEStep(*networks(), noise=Noise(0), steps=1, gamma_eps=0.1)
    with pytest.raises(ValueError, match="gamma_z must be given"):
        sample(*arguments())


def test_side_by_side_is_in_turn_where_nobody_asked():
    seen = []
    assert side_by_side(lambda: seen.append("first") or 1, lambda: seen.append("second") or 2) == (1, 2)
    assert seen == ["first", "second"]
    with branches(False):
        assert side_by_side(lambda: 1, lambda: 2) == (1, 2)


@pytest.mark.parametrize("fake_score_of", ["its own", "a copy", "the teacher itself"])
@pytest.mark.parametrize("guidance", [None, 2.0])
def test_neither_branch_reads_what_the_other_is_still_to_write(monkeypatch, fake_score_of, guidance):
    """Copies of a Denoiser share its functions of the time, and values of those were once taken across streams."""
    made = [emd_fast.fuse(randomised(SmallUNet(1, num_classes=5), seed, 0.5)).eval() for seed in range(3)]
    options = {"sigma_data": 0.5, "sample_shape": (1, 8, 8), "null_cond": 4}
    teacher, other, own = (Denoiser(network, schedules.EDM(), "edm", **options) for network in made)
    fake_score = {"its own": own, "a copy": copy.deepcopy(teacher), "the teacher itself": teacher}[fake_score_of]
    z, eps, t = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8), torch.full((2,), 0.7)
    settings = {"cond": torch.arange(2), "guidance": guidance, "noise": Noise(0), **SETTINGS}
    run = lambda: e_step(Generator(other, 1.0), teacher, fake_score, z, eps, t, **settings)  # noqa: E731
    expected = run()
    with Streams(monkeypatch) as streams, branches():
        assert_as_eager(run(), expected)
    assert not streams.races
    assert len(streams.made) == 1, "what one stream has freed no other gets again"


def test_streams_that_do_not_wait_are_found(monkeypatch):
    with Streams(monkeypatch) as streams:
        ours, other = streams.current, torch.cuda.Stream()
        x = torch.ones(3)
        with torch.cuda.stream(other):
            y = x + 1
        assert streams.races == ["aten.add.Tensor"]
        ours.wait_stream(other)
        y.add_(x)
        assert streams.races == ["aten.add.Tensor"]
