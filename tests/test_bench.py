"""The benchmarks: every contender is verified, what is wrong is caught, the bytes are those of the docs. No times."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import benchmarks
from benchmarks.harness import clock
from benchmarks.harness.contenders import Contender, contenders_of
from benchmarks.harness.declare import BOTH, FORWARD, Case, RandomTensors
from benchmarks.harness.verify import Verifier
from emd_fast.config import ConfigError

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
COMPILED = ["torch.compile"]


def tiny(name, dtype="bf16", layout=None, passes=FORWARD):
    bench = benchmarks.load(name)
    shape = {1: (2,), 4: (3, 4, 8, 8), 5: (2, 7, 3, 8, 5)}[len(bench.axes)]
    (case,) = (c for c in bench.cases([shape], dtype, layout, CPU) if c.passes == passes)
    return bench, case


CASES = [
    (name, dtype, passes)
    for name in benchmarks.OPS
    for dtype in ("bf16", "fp16", "fp32")
    for passes in ((FORWARD, BOTH) if benchmarks.load(name).gradients else (FORWARD,))
]


@pytest.mark.parametrize(("name", "dtype", "passes"), CASES)
def test_every_contender_is_verified(name, dtype, passes):
    layouts = (None, "nhwc") if benchmarks.load(name).layouts else (None,)
    for layout in layouts:
        bench, case = tiny(name, dtype, layout, passes)
        contenders, absent = contenders_of(bench, case, skip=COMPILED)
        assert {"emd_fast reference", "eager"} <= {c.name for c in contenders}
        assert all(absent.values()), "a backend that is missing says why"
        verifier = Verifier(bench, case)
        for contender in contenders:
            verification = verifier.verify(contender)
            assert verification.problem is None, f"{contender.name}: {verification.problem}"
            assert verification.error is not None and verification.error <= verification.bound


def test_the_training_step_and_the_bare_passes_make_the_same_calls():
    bench, case = tiny("training_step", "fp32")
    verifier = Verifier(bench, case)
    ours, bare = contenders_of(bench, case)[0]
    assert (ours.ours, bare.ours) == (True, False)
    assert verifier.verify(ours).error == verifier.verify(bare).error == 0

    def half(trainer, calls, **arguments):
        bare.function(trainer, calls, **arguments)
        return calls.taken() + 1

    assert verifier.verify(dataclasses.replace(bare, function=half)).wrong


@pytest.mark.slow
def test_compiled_eager_code_is_verified():
    for passes in (FORWARD, BOTH):
        bench, case = tiny("m_step_loss", passes=passes)
        (compiled,) = (c for c in contenders_of(bench, case)[0] if c.name in COMPILED)
        assert Verifier(bench, case).verify(compiled).problem is None


WRONG = {
    "a longer step": (
        "langevin_eps",
        lambda b, a: b.op(**a | {"step_size": a["step_size"] * 1.01}),
        "is off by",
    ),
    "noise of another step": ("langevin_z", lambda bench, a: a["noise"].advance() or bench.op(**a), "is off by"),
    "outputs turned round": (
        "langevin_eps",
        lambda b, a: b.op(**a | {"outputs": a["outputs"][::-1]}),
        "is off by",
    ),
    "nothing returned": ("perturb", lambda bench, arguments: None, "must return"),
    "too much returned": ("langevin_z", lambda bench, a: a["z"], "must return"),
    "no tensor": ("perturb", lambda bench, arguments: 1.0, "must be a tensor"),
    "another shape": ("perturb", lambda bench, a: bench.op(**a)[:1], "shape"),
    "another dtype": ("perturb", lambda bench, a: bench.op(**a).float(), "must be torch.bfloat16"),
    "NaN": ("perturb", lambda bench, a: bench.op(**a) * float("nan"), "is off by nan"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_contender_is_caught(what):
    name, change, said = WRONG[what]
    bench, case = tiny(name)
    verification = Verifier(bench, case).verify(Contender("theirs", lambda **arguments: change(bench, arguments)))
    assert verification.wrong and said in verification.problem


def test_ours_is_held_to_twice_the_error_of_eager_and_one_that_cannot_run_is_not_called_wrong():
    def refuses(**arguments):
        raise RuntimeError("no kernel\nfor this")

    bench, case = tiny("perturb", "fp32")
    verifier = Verifier(bench, case)
    assert verifier.verify(Contender("ours", lambda **a: bench.op(**a) + 3e-5, ours=True)).wrong
    verification = verifier.verify(Contender("theirs", refuses))
    assert not verification.wrong and verification.problem == "cannot run: RuntimeError: no kernel for this"


def test_a_wrong_gradient_is_caught():
    bench, case = tiny("score_matching_loss", "fp32", passes=BOTH)
    verifier = Verifier(bench, case)

    def wrong(**arguments):
        loss = bench.op(**arguments)
        return loss.detach() + 1.001 * (loss - loss.detach())  # the value is right

    verification = verifier.verify(Contender("theirs", wrong))
    assert verification.wrong and verification.problem.startswith("gradient of output")
    forward, case = tiny("score_matching_loss", "fp32")
    assert Verifier(forward, case).verify(Contender("theirs", wrong)).problem is None


@pytest.mark.parametrize("name", ["langevin_eps", "perturb", "langevin_step", "m_step_loss", "group_norm"])
def test_an_eager_formula_that_is_not_the_op_is_caught(name):
    bench, case = tiny(name)

    def wrong(**arguments):
        out = bench.eager(**arguments)
        return (out[0] + 1e-4, *out[1:]) if isinstance(out, tuple) else out + 1e-4

    changed = dataclasses.replace(bench, eager=wrong)
    verifier = Verifier(changed, case)
    eager = next(c for c in contenders_of(changed, case, skip=COMPILED)[0] if c.name == "eager")
    assert verifier.verify(eager).wrong
    ours = next(c for c in contenders_of(bench, case, skip=COMPILED)[0] if c.name == "emd_fast reference")
    assert verifier.verify(ours).problem is None, "what is wrong with eager is not held against us"


@pytest.mark.parametrize("name", ["uniform", "normal"])
def test_numbers_of_another_distribution_are_caught(name):
    bench, case = tiny(name)
    half = Contender("theirs", lambda **arguments: 0.5 * bench.eager(**arguments), draws="own")
    assert Verifier(bench, case).verify(half).wrong


def test_bytes_are_those_of_the_docs():
    section = (ROOT / "docs" / "ops.md").read_text().partition("## Bytes and floors")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`\w+`|its backward) \|.*\| (\d+) \| (\d+) \| (\d+) \|$", section, re.MULTILINE)
    documented, last = {}, None
    for op, read, written, total in rows:
        last = op.strip("`") if op != "its backward" else last
        documented[last, BOTH if op == "its backward" else FORWARD] = (int(read), int(written))
        assert int(total) == int(read) + int(written), op
    found = {}
    for name, passes in documented:
        dtype = "fp32" if name in ("normal", "perturb", "langevin_z") else "bf16"

        def traffic(passes, name=name, dtype=dtype):
            case = Case((2, 4, 4, 5), dtype, "nchw", CPU, passes)
            return tuple(part / case.elements for part in benchmarks.load(name).traffic(case))

        found[name, passes] = traffic(passes)
        if passes == BOTH:
            found[name, BOTH] = tuple(a - b for a, b in zip(traffic(BOTH), traffic(FORWARD), strict=True))
    assert len(documented) >= 11 and found == documented
    elementwise = {name for name in benchmarks.OPS if benchmarks.load(name).traffic} - {"attention", "langevin_step"}
    assert elementwise == {name for name, _ in documented}
    # perturb reads eps here and writes float32, whatever x0 is.
    case = Case((2, 4, 4, 5), "bf16", "nchw", CPU, FORWARD)
    step = benchmarks.load("langevin_step").traffic(case).total / case.elements
    assert step == (2 + 4 + 4) + sum(documented["langevin_eps", FORWARD]) + 10


def test_the_docs_have_the_signatures():
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    documented = dict(re.findall(r"^\| `(\w+)` \| `\(([\w, ]+)\)`", text, re.MULTILINE))
    assert set(documented) == set(benchmarks.OPS)
    for name, words in documented.items():
        bench, case = tiny(name)
        assert set(words.split(", ")) == bench.inputs(RandomTensors(case, 0)).arguments.keys(), name


def test_attention_counts_its_keys():
    bench = benchmarks.load("attention")
    case, cross = (Case(shape, "bf16", "nchw", CPU) for shape in ((2, 6, 3, 8), (2, 6, 3, 8, 12)))
    assert bench.flops(case) == 4 * 2 * 3 * 6 * 6 * 8 and bench.flops(cross) == 2 * bench.flops(case)
    assert bench.traffic(cross) == (2 * 2 * 3 * 8 * (6 + 24), 2 * 2 * 3 * 8 * 6)
    assert bench.flops(dataclasses.replace(case, passes=BOTH)) == 3.5 * bench.flops(case)


def test_a_peer_takes_part_where_it_is_installed(tmp_path, monkeypatch):
    gpu = torch.device("cuda", 0)
    cases = {
        "attention": Case((2, 6, 3, 8), "bf16", "nchw", gpu),
        "group_norm": Case((2, 128, 8, 8), "bf16", "nhwc", gpu),
    }
    assert not any(benchmarks.load(name).peers(case) for name, case in cases.items())
    for package in ("xformers", "flash_attn", "liger_kernel", "group_norm_cuda", "apex"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise RuntimeError('imported before it is called')")
    monkeypatch.syspath_prepend(tmp_path)
    assert set(benchmarks.load("attention").peers(cases["attention"])) == {"xformers", "flash_attn"}
    assert set(benchmarks.load("group_norm").peers(cases["group_norm"])) == {"apex", "liger"}
    on_cpu = dataclasses.replace(cases["attention"], device=CPU)
    assert not benchmarks.load("attention").peers(on_cpu)


@pytest.mark.parametrize(
    ("op", "shape", "layout", "said"),
    [
        ("langevin_eps", (4,), None, r"langevin_eps takes --shape B,C,\[H\],\[W\], got 1 sizes: 4"),
        ("langevin_eps", (2, 3), "nhwc", "no --layout nhwc for 2,3"),
        ("attention", (2, 3, 4, 5), "nhwc", "attention has no --layout"),
    ],
)
def test_a_shape_of_the_wrong_rank_or_layout_is_refused(op, shape, layout, said):
    with pytest.raises(ConfigError, match=said):
        benchmarks.load(op).cases([shape], "bf16", layout, CPU)


def test_contenders_take_turns_and_nobody_finds_the_set_of_another(monkeypatch):
    monkeypatch.setattr(clock, "_calls", lambda block, each: 1)
    log = []
    calls = {name: [lambda name=name, i=i: log.append((name, i)) for i in range(4)] for name in "ABC"}
    taken, failed, peaks = clock.measure(calls, CPU, rounds=4)
    assert not failed and not peaks and {name: len(times) for name, times in taken.items()} == {"A": 4, "B": 4, "C": 4}
    rounds = log[-24:]  # each turn is a call that is not timed and one that is
    assert [name for name, _ in rounds] == list("AABBCC") * 4
    assert [i for _, i in rounds] == [0, 1, 2, 3] * 6, "each set is touched as seldom as there are sets"


def test_a_timing_is_the_median_and_the_quartiles_and_noise_separates_two_runs_of_the_same():
    assert clock.Timing.of([4.0, 1.0, 3.0, 2.0, 5.0]) == clock.Timing(3.0, 2.0, 4.0, 5)
    assert clock.Timing.of([2.0]) == clock.Timing(2.0, 2.0, 2.0, 1)
    assert clock.timing_noise([1.0] * 9, [1.0] * 9) == 0
    assert clock.timing_noise([1.0] * 9, [1.1] * 9) == pytest.approx(0.1)
    assert clock.timing_noise([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) > 0.3  # the same median by luck


@pytest.mark.slow
def test_pytest_runs_every_op(tmp_path):
    pytest.importorskip("pytest_benchmark")
    words = ["--shape", "2,4,8,8", "--device", "cpu", "--skip", "torch.compile", "--benchmark-disable", "-v"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "benchmarks", *words],
        capture_output=True, text=True, cwd=ROOT, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:]
    for name in benchmarks.OPS:
        assert re.search(rf"\[{name}-forward-eager\] PASSED", done.stdout), name
    assert "[group_norm-forward+backward-emd_fast_reference] PASSED" in done.stdout


def test_the_operations_of_a_network_are_counted_without_it():
    from benchmarks import networks

    kind, cpu = networks.NETWORKS["small"], torch.device("cpu")
    network = networks.denoiser(kind, 0, cpu)
    # By the plain path: the counter does not know PyTorch's attention kernel for CPUs.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, *kind.sample_shape), torch.ones(1), kind.condition(1, cpu))
    assert networks.flops("small") == counter.get_total_flops() > 0
    # A Langevin step is three passes and a backward pass to the input: 14.0 TFLOP for 16 samples.
    assert networks.flops("adm") == pytest.approx(219.3e9, rel=1e-3)
