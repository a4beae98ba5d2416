"""Detectors, run folders and recipes of an attacker: code that a file names is run only if the user names it too."""

import io
import os
import pickle
import sys
import zipfile

import detector_files
import pytest
import tomli_w
import torch
from torch import Tensor, nn
from watch import Runs, one_line, watched

from emd_fast import config
from emd_fast.io import code
from emd_fast.io.code import CodeRefused
from emd_fast.metrics import detector as detectors
from emd_fast.metrics.detector import Detector, DetectorError
from emd_fast.run import distill
from emd_fast.run import folder as folders
from emd_fast.tasks.pretrained import Pretrained
from emd_fast.train import checkpoint


class WritesFiles(nn.Module):
    """TorchScript that makes a file: it is code, though it holds no Python."""

    def forward(self, x: Tensor, return_features: bool = False) -> Tensor:
        torch.from_file("made_by_the_detector", shared=True, size=8)
        return x.float().flatten(2).mean(2)


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def pt2(**entries):
    """The archive of torch.export, with these entries."""

    def write(path):
        with zipfile.ZipFile(path, "w") as made:
            for name, content in {"archive_format": b"pt2", "archive_version": b"0", **entries}.items():
                made.writestr(f"d/{name}", content)

    return write


PROGRAMS = {
    "a pickled weight": pt2(**{"data/weights/weight_0": saved(Runs())}),
    "an opaque constant": pt2(**{"data/constants/opaque_0": pickle.dumps(Runs())}),
    "sample inputs": pt2(**{"data/sample_inputs/model.pt": saved(Runs())}),
    "a program that is TorchScript too": pt2(**{"constants.pkl": pickle.dumps(Runs()), "code/x.py": b"import os"}),
    "a format in another folder": pt2(**{"x/archive_format": b"pt2", "constants.pkl": b""}),
    "weights of torch": lambda path: torch.save(Runs(), path),
    "weights of old torch": lambda path: torch.save(Runs(), path, _use_new_zipfile_serialization=False),
    "a pickle": lambda path: path.write_bytes(pickle.dumps(Runs())),
    "a fifo": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("suffix", ["pt", "pt2"])
def test_a_file_that_would_run_python_is_no_detector(tmp_path, name, suffix):
    path = tmp_path / f"d.{suffix}"
    PROGRAMS[name](path)
    with watched(), pytest.raises(DetectorError) as error:
        Detector(path)
    one_line(error, path)


def test_a_program_runs_if_its_hash_is_known_or_the_user_names_it(tmp_path, monkeypatch):
    path = detector_files.detector(tmp_path / "d.pt")
    with watched(), pytest.raises(CodeRefused, match=r"give --detector .*d\.pt to allow it") as error:
        Detector(path, named=False)
    named = Detector(path)
    assert named.sha256 in str(error.value)
    monkeypatch.setattr(detectors, "_KNOWN", {named.sha256})
    assert Detector(path, named=False).sha256 == named.sha256
    torch.jit.script(WritesFiles()).save(str(path))
    with watched(), pytest.raises(CodeRefused):
        Detector(path, named=False)


MODULE = "hostile_module_of_a_run"
TEACHER = f"{MODULE}:teacher"


def settings_of(**tables):
    return {"task": "pretrained", "pretrained": {"teacher": TEACHER}, **tables}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run folder that names a module in the current folder, which leaves a trace if it is imported."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / f"{MODULE}.py").write_text("open('ran', 'w')\ndef teacher(): open('ran', 'w')\n")
    folder = tmp_path / "run"
    checkpoint.save(folder / "checkpoints" / "step-00000002", {"step": 2})
    checkpoint.save(folder / "checkpoints" / "best", {"step": 2})
    folders.write_config(folder, config.from_dict(config.RunConfig, settings_of()))
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(settings_of()))
    return folder


COMMANDS = """sample run --out x.png | sample run --out x.png --best | export run x | evaluate run | plan recipe.toml
replay run --step 2 --sample 0 | distill recipe.toml --out new | distill run/config.toml --out new
plan run/config.toml --devices 2""".replace("\n", "|").split("|")


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_does_not_import_what_a_file_names(refused, run, tmp_path, words):
    refused(2, f"--teacher {TEACHER} to allow it", *words.split())
    assert not (tmp_path / "ran").exists() and MODULE not in sys.modules and str(tmp_path) not in sys.path


def test_what_the_user_names_is_imported(refused, run, tmp_path):
    words = ("sample", "run", "--out", "x.png", "--teacher")
    refused(2, "must return an emd_fast.Denoiser", *words, TEACHER)
    assert (tmp_path / "ran").exists()
    del sys.modules[MODULE]
    refused(2, f"has the teacher '{TEACHER}', not 'another:teacher'", *words, "another:teacher")


def test_a_run_in_python_does_not_import_what_its_folder_names(run):
    task = Pretrained(folders.settings_of(run))
    with watched(), pytest.raises(CodeRefused):
        task.untrained_teacher()
    with pytest.raises(CodeRefused):
        distill.open_run(run)
    with code.allow("another:teacher"), pytest.raises(CodeRefused):
        distill.open_run(run)


RECIPES = {
    "a fifo": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    **{text[:9]: lambda path, text=text: path.write_bytes(text) for text in (
        b"a = " + b"[" * 10**5, b'task = "\xff"', b"emd = 3", b'task = ["digits"]'
    )},
    **{key: lambda path, key=key: path.write_text(f"task = 'gmm'\nmixture.{key} = 1000000000\n") for key in (
        "modes", "generator_layers", "fake_score_layers", "generator_width"
    )},
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_that_are_none(refused, tmp_path, name):
    RECIPES[name](tmp_path / "recipe.toml")
    refused(2, "recipe.toml", "plan", "recipe.toml")


def test_a_detector_that_a_file_names_is_not_run(refused, run, tmp_path):
    detector_files.detector(tmp_path / "d.pt")
    table = settings_of(evaluation={"detector": "d.pt"})
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(table))
    # A teacher that can be used, so that the detector is reached.
    (tmp_path / f"{MODULE}.py").write_text("from test_evaluate import small as teacher")
    refused(2, "give --detector d.pt to allow it", "distill", "recipe.toml", "--out", "new", "--teacher", TEACHER)
    with pytest.raises(CodeRefused):
        Pretrained(config.from_dict(config.RunConfig, table)).open_references()
