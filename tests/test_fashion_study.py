"""The study of Fashion-MNIST: its cells, its budget, its tables, and how it goes on after an interruption."""

import json

import pytest
import torch
from test_fashion import TINY, written

from emd_fast import config
from emd_fast.config import ConfigError
from emd_fast.run import distill, fashion_cells, fashion_study
from emd_fast.run.fashion_cells import CELLS, Cell, settings_of
from emd_fast.run.folder import RunError
from emd_fast.run.passes import passes
from emd_fast.tasks import image_cache
from emd_fast.train.health import Diverged


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    monkeypatch.setenv(image_cache.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr("emd_fast.tasks.fashion.distributed.default_device", lambda: torch.device("cpu"))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(folder, **changes):
    keys = {**TINY, "fashion.data": str(folder), "teacher.label_dropout": 0.5, "log_every": 1}
    return config.load("fashion", {**keys, **{key.replace("__", "."): value for key, value in changes.items()}})


TWO = {
    "a": Cell("A", "Two.", {"one": {}, "two": {"objective": "vsd"}}, ("frechet", "passes", "seconds")),
    "d": Cell("D", "One.", {"with": {}, "without": {"noise_cancellation": False}}, ("frechet",), curve=True),
}


@pytest.fixture
def two(monkeypatch):
    for name in ("a", "d"):
        monkeypatch.setitem(CELLS, name, TWO[name])
    for letter in set(CELLS) - set(TWO):
        monkeypatch.delitem(CELLS, letter)


def test_every_variant_is_valid_and_makes_as_many_passes():
    study = config.load("fashion")
    budget = study.emd.steps * passes(study.emd)
    runs = []
    for letter, cell in CELLS.items():
        for name, changes in cell.variants.items():
            run = settings_of(study, changes, 1)
            assert run.emd.seed == 1
            assert run.emd.steps * passes(run.emd) == pytest.approx(budget, rel=0.01), (letter, name)
            runs.append(run)
    assert list(CELLS) == list("abcdefg") and "".join(fashion_cells.ALL) == "abcdefgh"
    assert {run.emd.sampling for run in runs} == {"eps_z", "x_z"}
    assert {run.emd.num_classes for run in runs} == {0, 10}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"langevin_steps": 3},
        {"objective": "vsd"},
        {"gamma_z": 0.0},
        {"sampling": "x_z"},
        {"guidance": 2.0},
        {"objective": "sid", "weighting": "adaptive"},
        {"objective": "sid", "guidance": 2.0},
        {"sampling": "x_z", "gamma_z": 0.0},
        {"fake_score_updates": 3},
    ],
)
def test_passes_are_those_that_a_step_makes(changes):
    from test_trainer import config as settings_with
    from test_trainer import digits_teacher

    from emd_fast import EMDTrainer

    settings = settings_with(num_classes=3, fuse=False, **changes)
    trainer = EMDTrainer(digits_teacher(null_cond=0), settings)
    rows = {"forward": 0, "backward": 0}

    def forward(module, inputs, output):
        rows["forward"] += len(output)
        if output.requires_grad:
            # To the input alone where the weights are frozen, else to the weights too.
            cost = 2 if any(parameter.requires_grad for parameter in module.parameters()) else 1
            output.register_hook(lambda gradient: rows.__setitem__("backward", rows["backward"] + cost * len(gradient)))

    for network in (trainer.generator, trainer.teacher, trainer.fake_score):
        network.register_forward_hook(forward)
    trainer.step()
    assert (rows["forward"] + rows["backward"]) / settings.batch_size == passes(settings)


def test_cells_share_the_runs_of_one_configuration(tmp_path):
    study = config.load("fashion")

    def place(letter, name):
        return fashion_study.run_folder(tmp_path, study, CELLS[letter].variants[name], 0)

    assert place("a", "K = 8") == place("c", "(eps, z)") == place("d", "with") == place("f", "K = 8, guidance 1")
    assert place("a", "K = 4") == place("e", "euler, gamma_eps 0.16") == place("g", "2 updates")
    every = [place(letter, name) for letter, cell in CELLS.items() for name in cell.variants]
    assert len(set(every)) == 33
    assert fashion_study._has_curve(study, CELLS["a"].variants["K = 8"])
    assert not fashion_study._has_curve(study, CELLS["a"].variants["K = 4"])


def test_letters_of_cells():
    assert fashion_cells.chosen("c, a") == ["a", "c"]
    with pytest.raises(ConfigError, match="--cells must be letters of a,b,c,d,e,f,g,h, got 'x'"):
        fashion_cells.chosen("a,x")


@pytest.mark.slow
def test_an_interrupted_study_is_the_whole_one(tmp_path, two, monkeypatch):
    data = written(tmp_path / "data")
    settings = tiny(data)
    fashion_study.conduct(settings, tmp_path / "whole", ["a"], 2)
    made, once = [], distill.distill

    def interrupted(run, own):
        made.append(own.name)
        if len(made) == 3:
            raise KeyboardInterrupt
        return once(run, own)

    monkeypatch.setattr(distill, "distill", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fashion_study.conduct(settings, tmp_path / "parts", ["a"], 2)
    text = (tmp_path / "parts" / "study.md").read_text()
    assert "| one | 1 |" in text and "| with | 1 |" in text and "| without | 0 | - |" in text
    fashion_study.conduct(settings, tmp_path / "parts", ["a"], 2)
    assert len(made) == 5 and len(set(made)) == 4
    whole, parts = (json.loads((tmp_path / name / "study.json").read_text()) for name in ("whole", "parts"))
    for rows in (whole, parts):
        for found in [row for cell in ("a", "d") for runs in rows[cell].values() for row in runs if row]:
            found.pop("seconds")
    assert whole == parts
    fashion_study.conduct(settings, tmp_path / "parts", ["a"], 2)  # finished: nothing is made again
    assert len(made) == 5


@pytest.mark.slow
def test_a_curve_and_a_run_that_diverged(tmp_path, two, monkeypatch):
    settings, once = tiny(written(tmp_path / "data"), emd__steps=8), distill.distill

    def diverging(run, own):
        if not run.emd.noise_cancellation:
            raise Diverged("z ran away")
        return once(run, own)

    monkeypatch.setattr(distill, "distill", diverging)
    path = fashion_study.conduct(settings, tmp_path / "study", ["d", "h"], 1)
    text = path.read_text()
    assert "| variant | 2 | 4 | 6 | 8 |" in text
    assert "without, seed 0, diverged: z ran away" in text
    assert "| one |" in text.split("Time of a step")[1] and " ms |" in text
    row = json.loads((tmp_path / "study" / "study.json").read_text())["d"]["with"][0]
    assert list(row["curve"]) == ["2", "4", "6", "8"] and row["curve"]["8"] == row["frechet"]
    assert 0 < row["seconds"]


def test_another_study_in_the_folder_is_refused(tmp_path, two):
    data = written(tmp_path / "data")
    settings = tiny(data)
    with pytest.raises(RunError, match=r"holds a study with emd.steps = 2, not 3: choose another --out"):
        for chosen in (settings, tiny(data, emd__steps=3)):
            fashion_study.conduct(chosen, tmp_path / "study", [], 1)
    fashion_study.conduct(tiny(data, log_every=5), tmp_path / "study", [], 1)  # may change


def test_a_study_does_not_go_on_with_another_device_or_dtype(tmp_path, two, monkeypatch):
    folder = tmp_path / "study"
    settings = tiny(written(tmp_path / "data"))
    fashion_study.conduct(settings, folder, [], 1)
    fashion_study.conduct(settings, folder, [], 1)
    monkeypatch.setattr("emd_fast.tasks.fashion.distributed.default_device", lambda: torch.device("cuda"))
    with pytest.raises(RunError, match="holds a study on cpu in float32, and this one would go on on cuda in bfloat16"):
        fashion_study.conduct(settings, folder, [], 1)


def test_cells_and_seeds_are_words_of_this_study_alone(refused):
    refused(2, "--cells and --seeds are for the study of fashion, not of gmm", "study", "gmm", "--cells", "a")
    refused(2, "--cells must be letters of", "study", "fashion", "--cells", "q")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"emd.guidance": 2.0}, "guidance must be None for the study of fashion"),
        ({"emd.objective": "vsd"}, "objective must be emd"),
        ({"emd.sampling": "x_z"}, "sampling must be eps_z"),
        ({"emd.noise_cancellation": False}, "noise_cancellation must be True"),
        ({"emd.rungs": 2}, "rungs must be 1"),
        ({"teacher.label_dropout": 0.0}, "label_dropout must be above 0"),
    ],
)
def test_settings_that_the_cells_vary_are_refused_before_anything_is_written(tmp_path, changes, said):
    with pytest.raises(ConfigError, match=said):
        fashion_study.conduct(config.load("fashion", changes), tmp_path / "study", ["a"], 1)
    assert not (tmp_path / "study").exists()
