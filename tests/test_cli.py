"""The command line: as a process where that matters, in this process where only words and exit codes do."""

import builtins
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import pytest
import torch
from spawned import Command, ended, wait_for

from emd_fast import config
from emd_fast.train import checkpoint, run_checkpoints

TINY = "--steps=4 --batch-size=16 --langevin-steps=2 --fake-score-warmup=0 --samples=50 --log-every=2".split()
TINY += "--mixture.generator-width=8 --mixture.fake-score-width 8".split()


def emd_fast(*words, **options):
    return subprocess.run(
        [sys.executable, "-m", "emd_fast", *map(str, words)], capture_output=True, text=True, timeout=300, **options
    )


@pytest.fixture(scope="module")
def gmm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "gmm"
    done = emd_fast("distill", "gmm", "--out", folder, *TINY)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(folder / "report.md")
    return folder


def test_distill_shows_plain_lines_where_there_is_no_terminal(gmm):
    ((code, said),) = ended([Command(["distill", "gmm", "--out", str(gmm), *TINY, "--steps=6"])])
    assert code == 0, said
    assert "resuming" in said and "distil 6/6" in said and "\r" not in said


def test_sample_writes_points_and_tensors(gmm, call, tmp_path):
    for name in ("points.png", "points.pt"):
        assert call("sample", gmm, "-n", 7, "--out", tmp_path / name)[0] == 0
    assert (tmp_path / "points.png").read_bytes().startswith(b"\x89PNG")
    assert torch.load(tmp_path / "points.pt").shape == (7, 2)


def test_evaluate_writes_the_metrics_again(gmm, call):
    before = json.loads((gmm / "metrics.json").read_text())
    (gmm / "metrics.json").unlink()
    code, out, _ = call("evaluate", gmm)
    assert code == 0
    assert json.loads(out)["frechet"] == json.loads((gmm / "metrics.json").read_text())["frechet"]
    assert json.loads(out)["frechet"]["teacher"] == before["frechet"]["teacher"]


def test_info_names_every_op_and_its_backend(call):
    facts = json.loads(call("info", "--json")[1])
    assert facts["torch"] == torch.__version__
    assert {"langevin_eps", "group_norm", "normal"} <= facts["ops"].keys()
    assert facts["ops"]["langevin_eps"]["cuda"]["backend"] in ("cuda", "triton", "reference")
    assert "langevin_eps" in call("info")[1]


def test_an_apex_that_is_not_nvidias_is_told_apart(call, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path / "site")
    package = tmp_path / "site" / "apex"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    assert "not NVIDIA's apex" in call("info")[1]
    (package / "optimizers").mkdir()
    (package / "optimizers" / "fused_adam.py").write_text("")
    assert "apex         NVIDIA's" in call("info")[1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["distil", "digits"], "did you mean 'distill'"),
        (["distill", "digit"], "did you mean 'digits'"),
        (["distill", "gmm", "--gama-z", "0.1"], "did you mean '--gamma-z'"),
        (["distill", "gmm", "--gamma-z"], "needs a value"),
        (["distill", "gmm", "--gamma-z", "2"], "gamma_z must be in [0, 1)"),
        (["distill", "gmm", "--langevin-steps", "0"], "langevin_steps"),
        (["distill", "gmm", "--steps", "many"], "steps must be int"),
        (["distill", "gmm", "--weighting", "sgima2"], "did you mean 'sigma2'"),
        (["sample", "x", "--out", "y.png", "--wat"], "unknown option '--wat'"),
        (["sample", "x", "--out", "y.jpeg"], ".png, .mp4, .gif or .pt"),
        ([], "COMMAND"),
    ],
)
def test_a_wrong_word_is_a_usage_error_in_one_line(call, words, said, tmp_path):
    code, _, err = call(*words)
    assert code == 2, err
    assert said in err
    assert len(err.strip().splitlines()) <= 2
    assert not list(tmp_path.iterdir())


def test_a_usage_error_is_no_traceback_of_the_process():
    done = emd_fast("distill", "gmm", "--gama-z", "0.1")
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_wrong_input_is_one_line_and_exit_code_2(gmm, call, refused, tmp_path):
    for name, content in {"bad.pkl": b"\x80\x04", "bad.toml": b"[", "bad.png": b"", "bad.safetensors": b"{}"}.items():
        (tmp_path / name).write_bytes(content)
    shutil.copytree(gmm, tmp_path / "run")
    damaged, *others = run_checkpoints.found(tmp_path / "run" / "checkpoints")
    (damaged / "manifest.json").write_text("{}")
    for path in others:
        shutil.rmtree(path)
    shutil.copytree(gmm, tmp_path / "empty", ignore=shutil.ignore_patterns("step-*"))
    detector = ["--detector", "nowhere.pt"]
    for said, *words in (
        ("is not the folder of a run", "evaluate", tmp_path),
        ("there is no detector file nowhere.pt", "evaluate", tmp_path, *detector),
        ("cannot write the run folder", "distill", "gmm", "--out", gmm / "config.toml" / "x", *TINY),
        ("holds a run with emd.gamma_eps = 0.16", "distill", "gmm", "--out", gmm, *TINY, "--gamma-eps", "0.3"),
        ("No such file", "distill", "nowhere.toml"),
        ("bad.toml", "plan", "bad.toml"),
        ("bad.toml", "study", "bad.toml"),
        (
            "there is no study of calls of gmm: the studies are langevin_steps of digits",
            "study",
            "gmm",
            "--vary",
            "calls",
        ),
        ("has no checkpoint yet", "sample", "empty", "--out", "x.png"),
        ("has no checkpoint yet", "export", "empty", "x.safetensors"),
        ("has no checkpoint yet", "replay", "empty", "--step=4", "--sample=0"),
        ("bad.safetensors", "sample", "bad.safetensors", "--out", "x.png"),
        ("No such file", "sample", gmm, "--out", "no/x.pt"),
        ("File name too long", "sample", gmm, "--out", f"{'x' * 300}.pt"),
        ("behind byte", "convert", "bad.pkl", "x.safetensors"),
        ("nowhere.pkl", "convert", "nowhere.pkl", "x.safetensors"),
        ("cannot be read", "bench", "normal", "--compare", "nowhere.json"),
        ("unknown option '--wat'", "info", "--wat"),
    ):
        refused(2, said, *words)
    for words in (("sample", "run", "--out", "x.png"), ("export", "run", "x.safetensors"), ("evaluate", "run")):
        code, _, err = call(*words)
        skipped, said = err.splitlines()
        assert code == 2 and skipped.startswith("skipped: ") and "none of the checkpoints" in said


@pytest.mark.parametrize(
    "number", [errno.EACCES, errno.ENOSPC, errno.EROFS, errno.EIO, errno.EMFILE], ids=errno.errorcode.get
)
def test_a_fault_of_the_machine_is_one_line_and_exit_code_1(gmm, refused, monkeypatch, tmp_path, number):
    (tmp_path / "file.pkl").write_bytes(b"")
    (tmp_path / "file.toml").write_text("")

    def fails(path, *_, **__):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(os, "fsync", fails)
    refused(1, os.strerror(number), "sample", gmm, "--out", "x.pt", "-n", 2)
    refused(1, os.strerror(number), "export", gmm, "x.safetensors")
    refused(1, f"cannot write the run folder run: {os.strerror(number)}", "distill", "gmm", "--out", "run", *TINY)
    monkeypatch.setattr(os, "open", fails)
    refused(1, f"cannot read the recipe file.toml: {os.strerror(number)}", "plan", "file.toml")
    refused(1, os.strerror(number), "evaluate", gmm)
    refused(1, os.strerror(number), "replay", gmm, "--step=4", "--sample=0")
    monkeypatch.setattr(builtins, "open", fails)
    refused(1, os.strerror(number), "convert", "file.pkl", "x.safetensors")


def test_a_run_that_fails_has_exit_code_1(call):
    code, _, err = call("distill", "gmm", "--out", "run", *TINY, "--max-z-rms=1e-3", "--log-every=1")
    assert code == 1 and "the RMS of z was" in err and "Traceback" not in err


@pytest.mark.parametrize("cls", [KeyError, TypeError, MemoryError, RecursionError])
def test_an_error_that_nobody_expects_is_one_line_with_its_place_and_a_file(call, monkeypatch, tmp_path, cls):
    def load(*_):
        raise cls("what\nand more")

    monkeypatch.setattr(config, "load", load)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code, out, said = call("plan", "gmm")
    assert (code, out) == (1, "")
    form = rf"emd-fast: unexpected {cls.__name__} at emd_fast/cli/commands\.py:\d+: .+; the traceback is in (\S+)\n"
    match = re.fullmatch(form, said)
    assert match and "Traceback" in (text := Path(match[1]).read_text()) and ", in load\n" in text
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    assert ", in load\n" in call("plan", "gmm")[2]  # no file: the traceback is not lost


def test_help_explains_every_key_in_one_line(call):
    assert "emd-fast distill digits" in call("--help")[1]
    lines = call("distill", "--help")[1].splitlines()
    for entry in (entry for table in config.tables() for entry in table.entries):
        option = f"  --{entry.short.replace('_', '-')} {entry.default} "
        (line,) = [line for line in lines if line.startswith(option)]
        assert f"  {entry.facts.help}" in line and entry.facts.range in line and entry.facts.unit in line


@pytest.mark.parametrize("option", ["--generator-lr", "--emd.optimizer.generator-lr"])
def test_a_key_of_a_section_goes_by_its_short_and_its_full_name(call, option):
    out = call("plan", "gmm", option, "0.25", "--optimizer-name=adamw_8bit", "--time-distribution.low", "0.5")[1]
    planned = tomllib.loads(out[: out.index("1 device,")])["emd"]
    assert (planned["optimizer"]["generator_lr"], planned["optimizer"]["name"]) == (0.25, "adamw_8bit")
    assert planned["time_distribution"]["low"] == 0.5


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_it_saves_says_so_and_exits_with_the_usual_code(tmp_path, number, code):
    folder = tmp_path / "run"
    words = ["distill", "gmm", "--out", str(folder), *TINY, "--steps=100000", "--save-every=100000"]
    process, log = Command(words), folder / "log.jsonl"
    wait_for(lambda: log.exists() and log.stat().st_size, [process])
    process.send_signal(number)
    ((found, said),) = ended([process])
    assert found == code, said
    assert "saved" in said and "Traceback" not in said
    (path,) = run_checkpoints.found(folder / "checkpoints")
    assert checkpoint.load(path)["step"] >= 2


LIGHT = """import sys, torch; before = set(sys.modules); import emd_fast; new = set(sys.modules) - before
optional = "triton sklearn diffusers matplotlib PIL scipy tqdm xformers apex transformers".split()
bad = [m for m in new if m.split('.')[0] in optional or m in ('torch._dynamo', 'torch._inductor')]
assert not bad, bad
import emd_fast.cli.commands as c; c.parse(['info'])
assert not [m for m in sys.modules if m.startswith('benchmarks')]"""


def test_importing_the_library_imports_nothing_optional_and_the_command_no_benchmarks():
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
