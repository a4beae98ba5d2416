"""emd-fast bench: words, exit codes, files, comparison. No assertion on a time."""

import dataclasses
import functools
import json

import pytest
import torch

import benchmarks
import emd_fast
from benchmarks.harness import ceiling, compare, digest, record, show
from benchmarks.harness.record import Record, Result, Row
from emd_fast.config import ConfigError

QUICK = ["--shape", "2,4,8,8", "--device", "cpu", "--rounds", "3", "--warm", "--skip", "torch.compile"]


@pytest.fixture(autouse=True)
def small_copy(monkeypatch):
    monkeypatch.setattr(ceiling, "_LEAST", {"cpu": 2**16})


@pytest.fixture
def bench(call):
    return functools.partial(call, "bench")


@pytest.mark.slow
def test_a_run_leaves_a_table_and_files(bench, tmp_path):
    files = [tmp_path / name for name in ("run.json", "run.md", "run.png")]
    words = zip(("--json", "--markdown", "--plot"), files, strict=True)
    code, out, err = bench("langevin_eps", "group_norm", *QUICK, *(word for pair in words for word in pair))
    assert code == 0, err
    assert "langevin_eps, forward, 2x4x8x8, bf16, nchw" in out and "group_norm, forward+backward" in out
    assert "copy ceiling" in out and "not timed: it serves cuda tensors only" in out
    assert files[2].read_bytes().startswith(b"\x89PNG")
    text = files[1].read_text()
    assert "| contender | median |" in text and "### group_norm, forward+backward, 2x4x8x8, bf16, nchw" in text
    fields = json.loads(files[0].read_text())
    assert fields["schema"] == record.SCHEMA and fields["settings"]["device"] == "cpu"
    assert {"cpu", "cores"} <= fields["hardware"].keys() and {"torch", "python", "triton"} <= fields["software"].keys()
    assert {"commit", "dirty"} == fields["commit"].keys()
    rows = {row["contender"]: row for row in fields["results"][0]["rows"]}
    eager, ours = rows["eager"], rows["emd_fast reference"]
    assert (eager["n"], ours["n"], eager["noise"]) == (3, 3, None) and ours["noise"] >= 0
    for row in (eager, ours):
        assert row["q1"] <= row["median"] <= row["q3"] and row["error"] <= row["bound"]
        rate = fields["results"][0]["bytes"] / row["median"]
        assert row["bytes_per_second"] == rate and row["share"] == rate / fields["ceiling"]["bytes_per_second"]
    assert rows["emd_fast cuda"]["status"] == "absent" and rows["emd_fast cuda"]["median"] is None
    assert digest.main([str(files[0])]) == 0


def test_backend_restricts_ours(bench, tmp_path):
    assert bench("langevin_z", *QUICK, "--backend", "reference", "--json", tmp_path / "a.json")[0] == 0
    (result,) = record.read(tmp_path / "a.json").results
    assert [row.contender for row in result.rows if row.ours and row.status == "timed"] == ["emd_fast reference"]


def test_against_is_verified_before_it_is_timed(bench, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from emd_fast import ops\n"
        "def right(z, z_grad, *, step_size, noise):\n"
        "    ops.langevin_z(z, z_grad, step_size=step_size, noise=noise)\n"
        "def wrong(z, z_grad, *, step_size, noise):\n"
        "    z += step_size * (z_grad - z)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "a.json"
    code, out, _ = bench("langevin_z", *QUICK, "--against", "mine:right", "--against", "mine:wrong", "--json", file)
    assert code == 0, "what is wrong with theirs is not our failure"
    rows = {row.contender: row for row in record.read(file).results[0].rows}
    assert rows["mine:right"].status == "timed"
    assert (rows["mine:wrong"].status, rows["mine:wrong"].median) == ("wrong", None)
    assert "mine:wrong: WRONG, not timed: z is off by" in out


@pytest.mark.parametrize(
    ("change", "out", "err"),
    [
        (lambda op: op(step_size=0.5), "emd_fast reference: WRONG, not timed", "emd-fast: wrong: langevin_z"),
        (lambda op: 1 / 0, "", "cannot run: ZeroDivisionError: division by zero"),
    ],
)
def test_ours_that_is_wrong_or_cannot_run_is_a_failure(bench, monkeypatch, change, out, err):
    right = benchmarks.load("langevin_z")

    def op(**arguments):
        change(lambda **more: right.op(**{**arguments, **more}))

    monkeypatch.setattr("benchmarks.langevin_z.BENCH", dataclasses.replace(right, op=op))
    code, *said = bench("langevin_z", *QUICK)
    assert code == 1 and out in said[0] and err in said[1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["langevin_ep"], "unknown op 'langevin_ep'"),
        (["langevin_ep"], "did you mean 'langevin_eps'?"),
        (["normal", "--shape", "2,a"], "must be sizes as 16,320,64,64"),
        (["normal", "--shape", "2,0"], "must be positive sizes"),
        (["normal", "--shape", "2"], "normal takes --shape B,C,[H],[W]"),
        (["attention", "--shape", "2,3,4"], "attention takes --shape B,tokens,heads,head_dim,[keys]"),
        (["attention", "--layout", "nhwc"], "attention has no --layout nhwc"),
        (["normal", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["normal", "--device", "tpu"], "--device must be cpu, cuda or cuda:N"),
        (["normal", "--against", "no_such_module:f"], "--against no_such_module:f: ModuleNotFoundError"),
        (["normal", "--against", "json:nothing"], "--against json:nothing: AttributeError"),
        (["normal", "--against", "json:__name__"], "is not a function"),
        (["normal", "--against", "json"], "takes module:function"),
        (["normal", "--skip", "nobody"], "--skip 'nobody' is no contender"),
        (["normal", "--rounds", "0"], "must be at least 1"),
        (["normal", "--compare", "missing.json"], "cannot be read"),
        (["normal", "--json", "no/such/folder/a.json"], "there is no folder"),
        (["normal", "--plot", "a.jpeg"], "--plot must end in .png"),
        (["normal", "--wat"], "unknown option '--wat'"),
        (["normal", "uniform", "--ncu"], "--ncu takes one op"),
        (["training_step", "--dtype", "fp16"], "training_step takes --dtype fp32 or bf16"),
    ],
)
def test_a_wrong_word_is_a_usage_error_in_one_line(bench, tmp_path, words, said):
    code, _, err = bench(*words)
    assert code == 2, err
    assert said in err and len(err.strip().splitlines()) <= 2
    assert not list(tmp_path.iterdir())


def test_what_is_not_here_is_one_line_and_exit_code_1(refused, monkeypatch, tmp_path):
    words = ("--device", "cpu", "--backend", "cuda")
    refused(1, "backend 'cuda' cannot run langevin_z on cpu tensors", "bench", "langevin_z", *words)
    refused(1, "no op has the backend cuda here", "bench", *words)
    monkeypatch.setattr(emd_fast, "__file__", str(tmp_path / "site-packages" / "emd_fast" / "__init__.py"))
    refused(1, "needs a checkout", "bench", "normal")


def test_ncu_prints_its_command_and_says_what_is_missing(bench, monkeypatch):
    monkeypatch.setenv("PATH", "")
    words = "langevin_eps --shape 64,3,64,64 --layout nhwc --backend triton"
    code, out, err = bench(*words.split(), "--ncu")
    assert code == 1 and "ncu is not on the PATH" in err
    assert out.startswith("ncu --profile-from-start off --clock-control none --section SpeedOfLight")
    words = words.replace("--layout", "--dtype bf16 --layout")
    assert f"bench {words} --device cuda --one-call" in out


def row(name, median, noise=0.01, ours=True):
    return Row(name, ours, "timed", None, 0.0, 1.0, median, median, median, 9, noise if ours else None)


def example(**changes):
    """Two cases, of a machine that is nowhere."""
    cases = {"forward": (row("emd_fast cpu", 1.0), row("eager", 4.0, ours=False))}
    cases["other"] = (row("emd_fast cpu", 2.0), row("emd_fast reference", 3.0))
    case = ((2, 3), "bf16", "nchw", 264.0, None, 1, True, "eager")
    fields = {
        "hardware": {"cpu": "a", "cores": 2},
        "settings": {"device": "cpu", "threads": 1, "rounds": 9, "warm": False, "graph": True},
        "results": tuple(Result("langevin_eps", passes, *case, rows) for passes, rows in cases.items()),
        "when": "2026-01-01T00:00:00+00:00",
        "software": {"torch": "2.11"},
        "ceiling": {"bytes_per_second": 1e10},
        "clocks": {"before": None, "after": None},
        "commit": {"commit": "0" * 40, "dirty": False},
    }
    return Record(**fields | changes)


def with_medians(done, change):
    """The same run with other medians: change(passes, row) -> seconds."""

    def changed(result):
        rows = tuple(dataclasses.replace(row, median=change(result.passes, row)) for row in result.rows)
        return dataclasses.replace(result, rows=rows)

    return dataclasses.replace(done, results=tuple(map(changed, done.results)))


def first_case(*rows, **changes):
    """A run with the first case alone, its rows or more of it changed."""
    result = example().results[0]
    return example(results=(dataclasses.replace(result, rows=rows or result.rows, **changes),))


def slower(factor, whose):
    return with_medians(example(), lambda _, row: row.median * (factor if whose(row) else 1))


GONE = Row("emd_fast cpu", True, "wrong", "z is off by 1")


@pytest.mark.parametrize(
    ("new", "said"),
    [
        (slower(1.1, lambda row: "reference" in row.contender), "reference took 3000 ms and takes 3300 ms: +10.0%"),
        (first_case(row("emd_fast cpu", 1.3, noise=0.0)), "emd_fast cpu took 1000 ms and takes 1300 ms: +30.0%"),
        (first_case(GONE, row("emd_fast triton", 1.0)), "no longer timed (z is off by 1)"),
        (first_case(shape=(9, 9)), "nothing was compared"),
        (slower(1.05, lambda row: True), None),
        (slower(0.5, lambda row: True), None),
        (slower(9, lambda row: not row.ours), None),
        (first_case(row("emd_fast cpu", 1.3, noise=0.2)), None),  # a noisier run can show less
    ],
)
def test_what_is_a_regression(new, said):
    found, _ = compare.regressions(example(), new)
    assert len(found) == (said is not None) and all(said in line for line in found)


def test_another_machine_or_configuration_is_refused(bench, tmp_path):
    same = example()
    assert compare.regressions(same, example(software={"torch": "2.13"}))[1] == ["torch was 2.11 and is 2.13"]
    assert compare.refusal(same, same.hardware, {**same.settings, "rounds": 3}) is None
    assert "threads was 1 and is 2" in compare.refusal(same, same.hardware, {**same.settings, "threads": 2})
    assert "gpu was None and is 'x'" in compare.refusal(same, {**same.hardware, "gpu": "x"}, same.settings)
    record.write(tmp_path / "theirs.json", same)
    code, out, err = bench("langevin_z", *QUICK, "--compare", tmp_path / "theirs.json")
    assert code == 2 and "cpu was 'a' and is" in err and len(err.strip().splitlines()) == 1
    assert not out, "refused before anything is measured"


@pytest.mark.slow
def test_compare_finds_a_planted_regression_in_a_run(bench, tmp_path):
    old, planted = tmp_path / "old.json", tmp_path / "planted.json"
    words = ["langevin_z", *QUICK, "--backend", "reference"]
    assert bench(*words, "--json", old)[0] == 0
    measured = record.read(old)
    record.write(planted, with_medians(measured, lambda _, row: row.median and row.median / 1e4))
    code, _, err = bench(*words, "--compare", planted)
    assert code == 1 and "emd-fast: regression: langevin_z, forward, 2x4x8x8" in err and " took " in err
    record.write(planted, with_medians(measured, lambda _, row: row.median and row.median * 1e4))
    code, out, err = bench(*words, "--compare", planted)
    assert code == 0, err
    assert "note: langevin_z" in out


@pytest.mark.parametrize("text", ["no json", "[1]", '{"schema": 99}', '{"schema": 1, "results": [{"op": 1}]}'])
def test_a_file_of_another_kind_is_refused(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    said = "has schema 99, this version reads 1" if "99" in text else "is not a file of"
    with pytest.raises(ConfigError, match=said):
        record.read(tmp_path / "a.json")


def test_the_memory_of_a_call_is_in_every_form_of_a_run(tmp_path):
    taken = dataclasses.replace(row("emd_fast cpu", 1.0), peak_bytes=1_540_000_000)
    result = dataclasses.replace(example().results[0], rows=(taken, row("eager", 4.0, ours=False)))
    assert "peak MB" not in show.terminal(example().results[0]), "nobody was on a GPU"
    done = dataclasses.replace(example(), results=(result,))
    record.write(tmp_path / "a.json", done)
    assert record.read(tmp_path / "a.json") == done
    header, first = (line.split() for line in show.terminal(result).splitlines()[1:3])
    assert "peak" in header and "1.54e+03" not in first and "1540" in first
    table = [line.split(" | ") for line in show.markdown(done).splitlines() if line.startswith("| ")]
    column = table[0].index("peak MB")
    assert [cells[column] for cells in table[2:]] == ["1540", ""]


SLOW = {
    "convolution": ["torch.compile"],
    "residual_block": ["torch.compile", "emd_fast fused, compiled"],
    "loop:small": ["emd_fast fused, compiled"],
}


@pytest.mark.parametrize("name", SLOW)
@pytest.mark.slow
def test_benches_of_what_surrounds_the_norms(bench, monkeypatch, tmp_path, name):
    monkeypatch.setattr(ceiling, "_SIDE", {"cpu": 32})
    skipped = [word for contender in SLOW[name] for word in ("--skip", contender)]
    words = ["--shape", "2" if name.startswith("loop") else "2,32,8,8", "--device", "cpu", "--rounds", 2, *skipped]
    code, out, err = bench(name, *words, "--json", tmp_path / "run.json")
    assert code == 0, out + err
    for result in json.loads((tmp_path / "run.json").read_text())["results"]:
        rows = {row["contender"]: row for row in result["rows"]}
        assert rows["emd_fast fused"]["status"] == "timed"
        assert all(row["share"] > 0 for row in rows.values() if row["status"] == "timed")


def test_the_shapes_are_those_of_the_networks():
    from benchmarks import attention, group_norm

    widths = [{shape[1] for shape in shapes} for shapes in (group_norm.ADM, group_norm.SD15)]
    assert widths[0] == {192, 384, 576, 768, 960, 1152, 1344, 1536}
    assert widths[1] == {320, 640, 960, 1280, 1920, 2560}
    assert {shape[1:] for shape in attention.ADM} == {(1024, 6, 64), (256, 9, 64), (64, 12, 64)}
    own = {(4096, 8, 40), (1024, 8, 80), (256, 8, 160), (64, 8, 160)}
    assert {shape[1:] for shape in attention.SD15} == own | {(*one, 77) for one in own}


class Stopped(BaseException):
    pass


def test_whole_networks_are_verified_small_and_leave_what_was_timed_when_a_run_is_stopped(bench, monkeypatch, tmp_path):
    declared = benchmarks.load("e_step:small")
    assert not declared.interleaves
    seen, stops = [], []

    def eager(networks, z, steps, **arguments):
        seen.append((len(z), steps, z.dtype == torch.float64))
        if stops and len(z) == 5:
            raise Stopped
        return declared.eager(networks, z=z, steps=steps, **arguments)

    changed = dataclasses.replace(declared, eager=eager)
    monkeypatch.setattr("benchmarks.e_step.bench", lambda kind: changed)
    monkeypatch.setattr(ceiling, "_SIDE", {"cpu": 32})
    words = ["e_step:small", "--shape", "5,3", "--device", "cpu", "--rounds", "1", "--no-compile"]
    code, out, err = bench(*words, "--json", tmp_path / "whole.json")
    assert code == 0 and "  emd_fast fused: " in out and "  eager: " in out, err
    assert {(batch, steps) for batch, steps, _ in seen} == {(2, 2), (5, 3)}
    assert all((batch, steps) == (2, 2) for batch, steps, double in seen if double), "float64 is slow"
    (result,) = record.read(tmp_path / "whole.json").results
    assert result.shape == (5, 3) and [row.status for row in result.rows] == ["timed", "timed", "absent", "absent"]
    stops.append(True)
    with pytest.raises(Stopped):
        bench(*words, "--json", tmp_path / "stopped.json")
    (result,) = record.read(tmp_path / "stopped.json").results
    rows = {row.contender: row.status for row in result.rows}
    assert rows["emd_fast fused"] == "timed" and "eager" not in rows


@pytest.mark.parametrize(
    ("shape", "verified"), [((16, 2), (2, 2)), ((4, 1), (4, 1)), ((1, 8), (1, 2)), ((64,), (2, 2))]
)
def test_the_float64_reference_of_an_e_step_is_at_most_four_samples_and_steps(shape, verified):
    from benchmarks.e_step import _verified_shape

    assert _verified_shape(*shape) == verified and verified[0] * verified[1] <= 4
