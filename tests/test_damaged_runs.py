"""What a run writes and reads again: damage is named and not used, no link is followed, killed legs leave nothing."""

import json
import os
import random
import shutil
import sys
import types

import pytest
import torch
from watch import one_line, turned

from emd_fast import cli, config
from emd_fast.config import ConfigError
from emd_fast.io import signed
from emd_fast.io.files import write_atomic
from emd_fast.reporting import journal, pictures, report
from emd_fast.run import distill as run
from emd_fast.run import folder as folders
from emd_fast.run.folder import RunError
from emd_fast.tasks import encoded, encoding
from emd_fast.train import checkpoint, conditions, run_checkpoints

TINY = {"steps": 4, "batch_size": 4, "langevin_steps": 1, "fake_score_updates": 1}


def settings(task="gmm", **changes):
    keys = {"log_every": 1, "save_every": 2, "samples": 40, "background_checkpoints": False}
    if task == "digits":
        keys |= {"teacher.steps": 2}
    return config.load(task, keys | {f"emd.{key}": value for key, value in (TINY | changes).items()})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "run"
    run.distill(settings(), folder)
    return folder


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "run")


def test_bits_of_a_configuration(folder):
    path, draw = folder / "config.toml", random.Random(0)
    content = path.read_bytes()
    for _ in range(60):
        path.write_bytes(turned(content, draw))
        for read in (lambda: folders.settings_of(folder), lambda: run.distill(settings(steps=6), folder)):
            with pytest.raises(RunError, match="is damaged, or was changed") as error:
                read()
            one_line(error, path)
    for text in (b"", b'task = "gmm"\n', content + b"\n", content * 2):
        path.write_bytes(text)
        with pytest.raises(RunError):
            folders.settings_of(folder)
    path.write_bytes(content)
    assert folders.settings_of(folder) == settings() == config.load(str(path))


def test_bits_of_the_metrics(folder, capsys):
    path, draw = folder / "metrics.json", random.Random(1)
    content = path.read_bytes()
    assert folders.finished_metrics(folder, settings()) is not None
    for _ in range(60):
        path.write_bytes(turned(content, draw))
        assert folders.finished_metrics(folder, settings()) is None and folders.seconds_of(folder) == {}
        assert f"{path} is damaged and not used" in capsys.readouterr().err
    path.write_bytes(content)
    assert set(folders.seconds_of(folder)) == {"teacher", "distil", "evaluate"}


def test_bits_of_the_log(folder):
    path, draw = folder / "log.jsonl", random.Random(2)
    content, rows = path.read_bytes(), journal.read(path)
    assert len(rows) == 4
    for _ in range(100):
        said = []
        path.write_bytes(turned(content, draw))
        found = journal.read(path, said.append)
        # A row whose end was cut off is what a crash leaves, and is left out in silence.
        cut = path.read_bytes()[-1:] != b"\n"
        assert len(found) < 4 and all(row in rows for row in found)
        assert cut or (len(said) == 1 and f"{path} is damaged in line" in said[0] and "\n" not in said[0])


STEPS = [{}, *({"step": step} for step in ("1", True, -1, 2**70, None))]
ROWS = [*STEPS, {"step": 1, "loss": "x"}, {"step": 1, "loss": [1.0]}, {"step": 1, "seconds": {}}]


def test_rows_of_another_form(folder):
    path = folder / "log.jsonl"
    lines = [signed.row_of(row) for row in ROWS]
    lines += ["[1, 2]\n", "3\n", "null\n", "[" * 10**5 + "\n", '{"step": 1' + "0" * 10**5 + "}\n", "\0\n", "\xff\n"]
    good = path.read_text()
    path.write_text("".join(lines) + good)
    said = []
    assert len(journal.read(path, said.append)) == 4 and len(said) == 1
    report.write(folder)
    (folder / "metrics.json").unlink()
    run.distill(settings(steps=6), folder)  # goes on, and takes them out
    assert [row["step"] for row in journal.read(path, pytest.fail)] == [1, 2, 3, 4, 5, 6]


def test_a_log_that_is_no_file_is_named(folder):
    path = folder / "log.jsonl"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match="it is not a regular file; move it away") as error:
        run.distill(settings(steps=6), folder)
    one_line(error, path)


METRICS = [{"seconds": {"distil": "x"}}, {"seconds": 3}, {"best": 3}, {"best": {"step": 1}}, {"detector": {"file": 1}}]


@pytest.mark.parametrize("change", [*METRICS, {"frechet": {"generator": {}}}, {"mean": [None]}])
def test_metrics_of_another_form(folder, change):
    folders.write_metrics(folder, folders.metrics_of(folder) | change)
    with pytest.raises(ValueError, match=r"metrics\.json has an entry") as error:
        report.write(folder)
    assert "\n" not in str(error.value) and isinstance(folders.seconds_of(folder), dict)


@pytest.mark.parametrize("name", ["checkpoints", "samples", "samples/networks", "teacher", "replay", "tensorboard"])
def test_a_run_writes_through_no_link(folder, tmp_path, name, monkeypatch, capsys):
    outside = tmp_path / "outside"
    outside.mkdir()
    shutil.rmtree(folder / name, ignore_errors=True)
    (folder / name).symlink_to(outside)
    with pytest.raises(RunError, match="is a link"):
        run.distill(settings(steps=6), folder)
    fresh = tmp_path / "fresh" / name
    fresh.parent.mkdir(parents=True)
    fresh.symlink_to(outside)
    with pytest.raises(RunError, match="is a link"):
        run.distill(settings(), tmp_path / "fresh")
    monkeypatch.chdir(tmp_path)
    for words in (["evaluate", "run"], ["replay", "run", "--step=2", "--sample=0"], ["sample", "run", "--out=x.png"]):
        assert cli.main(words) in (1, 2)
        assert "is a link" in capsys.readouterr().err
    assert not list(outside.iterdir())


def test_links_in_the_place_of_files_are_replaced_or_refused(folder, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("whole")
    names = ["log.jsonl", "metrics.json", "report.md", "curves.png", "samples/points.png"]
    names += [f".{name}.{os.getpid()}.tmp" for name in ("log.jsonl", "metrics.json", "report.md", "config.toml")]
    for name in names:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(victim)
    run.distill(settings(steps=6), folder)
    assert victim.read_text() == "whole" and not any((folder / name).is_symlink() for name in names)
    (folder / ".lock").unlink()
    (folder / ".lock").symlink_to(victim)
    with pytest.raises(RunError, match="lock"):
        run.distill(settings(steps=8), folder)
    assert victim.read_text() == "whole"
    for make in (lambda path: path.hardlink_to(victim), os.mkfifo):
        (folder / ".lock").unlink()
        make(folder / ".lock")
        with pytest.raises(RunError, match="is no regular file of its own"):
            run.distill(settings(steps=8), folder)
    assert victim.read_text() == "whole"
    os.symlink(victim, tmp_path / f".x.{os.getpid()}.tmp")
    write_atomic(tmp_path / "x", lambda file: file.write(b"new"))
    assert victim.read_text() == "whole" and (tmp_path / "x").read_text() == "new"


def test_the_next_leg_removes_what_killed_legs_left(folder):
    left = [".log.jsonl.7.tmp", ".metrics.json.8.tmp", "samples/.points.png.9.tmp", ".teacher.tmp/.x.1.tmp"]
    left += ["checkpoints/.step-00000009.tmp/rank-00000.bin", "samples/networks/.step-00000002.png.3.tmp"]
    for name in left:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("half")
    kept = [folder / "notes.tmp", folder / ".hidden", folder / "mine" / ".x.tmp"]
    for path in kept:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    run.distill(settings(steps=6), folder)
    assert list(folder.rglob(".*.tmp")) == kept[2:] and all(path.exists() for path in kept)


def test_a_first_run_removes_nothing_of_others(tmp_path):
    (tmp_path / ".x.tmp").touch()
    run.distill(settings(), tmp_path)
    assert (tmp_path / ".x.tmp").exists()


@pytest.mark.parametrize("name", ["model_index.json", "config.json", "emd_fast.json"])
def test_a_run_is_not_made_in_the_folder_of_a_model(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(RunError, match="is the folder of a model: choose another --out"):
        run.distill(settings(), tmp_path)
    assert os.listdir(tmp_path) == [name]


def test_a_picture_that_a_kill_took_is_drawn_by_the_next_leg(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "curves", lambda *_: None)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run.distill(settings("digits"), whole)
    write, last = pictures.save_grid, whole / "samples" / "networks" / "step-00000004.png"

    class Killed(BaseException):
        pass

    def kill(path, *arguments, **options):
        if path.name == last.name:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_name(f".{last.name}.1.tmp").write_bytes(b"half")
            raise Killed
        write(path, *arguments, **options)

    monkeypatch.setattr(pictures, "save_grid", kill)
    with pytest.raises(Killed):
        run.distill(settings("digits"), killed)
    drawn = killed / "samples" / "networks"
    assert (
        run_checkpoints.found(killed / "checkpoints")[-1].name == "step-00000004" and not (drawn / last.name).exists()
    )
    monkeypatch.setattr(pictures, "save_grid", write)
    run.distill(settings("digits"), killed)
    assert (drawn / last.name).read_bytes() == last.read_bytes()
    assert {path.name for path in drawn.iterdir()} == {path.name for path in last.parent.iterdir()}


class Teacher:
    """A teacher and its text encoder: encodes the length of each prompt, and counts its calls."""

    def __init__(self, root):
        self.folder, self.calls = type("Folder", (), {"root": root, "file": None}), 0
        (root / "text_encoder").mkdir(parents=True)
        (root / "text_encoder" / "config.json").write_text("{}")

    batch, prompt_dtype = 32, torch.float32

    def text_encoder(self):
        return self

    def truncated(self, prompts):
        return 0

    def __call__(self, prompts):
        self.calls += 1
        return torch.tensor([[[float(len(prompt))]] for prompt in prompts])


@pytest.fixture
def prompts(tmp_path):
    """(teacher, text file, run folder), encoded once."""
    teacher, text, folder = Teacher(tmp_path / "teacher"), tmp_path / "p.txt", tmp_path / "run"
    text.write_text("a\nbb\n")
    folder.mkdir()
    encoded.encoded(teacher, text, folder)
    encoded.encoded(teacher, text, folder)
    assert teacher.calls == 2  # the prompts, and the empty one
    return teacher, text, folder


def lengths(folder):
    return conditions.Mapped(folder / encoded.TABLE)[torch.arange(2)].flatten().tolist()


CHANGES = {
    "another text": (lambda teacher, text: text.write_text("a\nccc\n"), "is not the text", [1.0, 3.0]),
    "another order": (lambda teacher, text: text.write_text("bb\na\n"), "is not the text", [2.0, 1.0]),
    "another encoder": (
        lambda teacher, _: (teacher.folder.root / "text_encoder" / "config.json").write_text("[]"),
        "the text encoders are not those", [1.0, 2.0]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_text_is_refused_by_a_begun_run_and_encoded_by_a_new_one(prompts, name):
    (teacher, text, folder), (change, _, now) = prompts, CHANGES[name]
    change(teacher, text)
    encoded.encoded(teacher, text, folder)
    assert teacher.calls == 4 and lengths(folder) == now
    change(teacher, text)
    checkpoint.save(folder / "checkpoints" / "step-00000001", {"step": 1})
    encoded.encoded(teacher, text, folder)
    text.write_text("x\nx\n")
    with pytest.raises(ConfigError, match="is not the text that") as error:
        encoded.encoded(teacher, text, folder)
    assert "\n" not in str(error.value) and teacher.calls == 4
    with pytest.raises(ConfigError, match="is not the text that"):
        encoded.check_texts(folder, ["x", "x"], text)


@pytest.mark.parametrize("name", CHANGES)
def test_a_begun_run_names_what_changed(prompts, name):
    teacher, text, folder = prompts
    checkpoint.save(folder / "checkpoints" / "step-00000001", {"step": 1})
    CHANGES[name][0](teacher, text)
    with pytest.raises(ConfigError, match=CHANGES[name][1]):
        encoded.encoded(teacher, text, folder)
    assert lengths(folder) == [1.0, 2.0]


@pytest.mark.parametrize("name", [encoded.TABLE, encoded.RECORD])
def test_bits_of_encoded_prompts(prompts, name):
    (teacher, text, folder), draw = prompts, random.Random(3)
    content = (folder / name).read_bytes()
    checkpoint.save(folder / "checkpoints" / "step-00000001", {"step": 1})
    for _ in range(60):
        (folder / name).write_bytes(turned(content, draw))
        with pytest.raises(ConfigError, match=r"prompts\.safetensors is damaged or not the one") as error:
            encoded.encoded(teacher, text, folder)
        assert "\n" not in str(error.value)
    assert teacher.calls == 2
    (folder / encoded.TABLE).unlink()
    (folder / encoded.RECORD).unlink()
    encoded.encoded(teacher, text, folder)  # the remedy that the error names
    assert teacher.calls == 4 and lengths(folder) == [1.0, 2.0]
    text.unlink()
    encoded.encoded(teacher, text, folder)  # a table stands without its text
    assert teacher.calls == 4


def test_an_unfinished_table_is_not_written_through_a_link(tmp_path):
    victim, folder = tmp_path / "victim", tmp_path / "run"
    victim.write_text("whole")
    folder.mkdir()
    (tmp_path / "p.txt").write_text("a\n")
    (folder / encoding.PART).hardlink_to(victim)
    (folder / encoding.ROWS).symlink_to(victim)
    encoded.encoded(Teacher(tmp_path / "teacher"), tmp_path / "p.txt", folder)
    assert victim.read_text() == "whole"


@pytest.mark.parametrize("content", [b"{}", b"[]", json.dumps({"format": 1, "sha256": "x"}).encode(), b"[" * 10**5])
def test_a_damaged_record_of_a_new_run_is_encoded_again(prompts, content):
    teacher, text, folder = prompts
    (folder / encoded.RECORD).write_bytes(content)
    encoded.encoded(teacher, text, folder)
    assert teacher.calls == 4


def test_bits_of_the_id_of_weights_and_biases(tmp_path, monkeypatch):
    given, draw = [], random.Random(5)

    def init(**options):
        given.append(options["id"])
        return types.SimpleNamespace(id="a1b2c3", log=lambda *_, **__: None, finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for _ in range(2):
        journal.Journal(tmp_path, 0, ("wandb",)).close()
    assert given == [None, "a1b2c3"]
    content = (tmp_path / "wandb.id").read_bytes()
    for damaged in [turned(content, draw) for _ in range(20)] + [b"a1b2c3", b"", b"../x\n", b"x" * 400]:
        (tmp_path / "wandb.id").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"wandb\.id is damaged .*: remove it to log to a new run") as error:
            journal.Journal(tmp_path, 0, ("wandb",))
        assert "\n" not in str(error.value)
    assert len(given) == 2
