"""Pictures pixel by pixel, and what report.md says of a folder."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from emd_fast.reporting import pictures, report


def test_every_pixel_of_a_grid():
    images = torch.tensor([-1.0, 0.0, 1.0, 5.0, -7.0])[:, None, None, None].expand(5, 1, 2, 3).clone()
    images[0, 0, 1, 2] = 1.0
    pixels = np.asarray(pictures.grid(images, columns=3, scale=2))
    assert pixels.shape == (2 * (4 + 2) + 2, 3 * (6 + 2) + 2, 3)
    cell = {i: pixels[2 + i // 3 * 6 :, 2 + i % 3 * 8 :][:4, :6] for i in range(6)}
    assert (cell[1] == 128).all() and (cell[2] == 255).all()
    assert (cell[3] == 255).all() and (cell[4] == 0).all()  # clipped
    assert (cell[0][2:, 4:] == 255).all() and cell[0].sum() == 2 * 2 * 3 * 255
    assert (cell[5] == 255).all()  # no image there
    gaps = np.ones(pixels.shape[:2], bool)
    for i in range(5):
        gaps[2 + i // 3 * 6 :, 2 + i % 3 * 8 :][:4, :6] = False
    assert (pixels[gaps] == 255).all()


def test_colours_and_defaults(tmp_path):
    images = -torch.ones(10, 3, 8, 8, dtype=torch.bfloat16)
    images[4, 1] = 1
    pixels = np.asarray(pictures.grid(images))
    assert pixels.shape == (3 * 34 + 2, 4 * 34 + 2, 3)  # four columns, enlarged to 32
    assert pixels[2 + 34 + 5, 2 + 5].tolist() == [0, 255, 0]
    pictures.save_grid(tmp_path / "new" / "a.png", images)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "new" / "a.png")), pixels)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]
    assert pictures.grid(images[:1], columns=8).size == (36, 36)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 8, 8),), r"got \(2, 8, 8\)"),
        ((torch.zeros(2, 2, 8, 8),), r"got \(2, 2, 8, 8\)"),
        ((torch.zeros(0, 1, 8, 8),), "not be empty"),
        ((torch.full((1, 1, 2, 2), math.nan),), "finite"),
        ((torch.zeros(2, 1, 8, 8), 0), "columns must be at least 1, got 0"),
        ((torch.zeros(2, 1, 8, 8), 1, 0), "scale must be at least 1, got 0"),
    ],
)
def test_bad_grids(arguments, message):
    with pytest.raises(ValueError, match=message):
        pictures.grid(*arguments)


def blue(path):
    """How many pixels of the picture have the colour of the points."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return int((pixels[..., 2] - pixels[..., 0] > 40).sum())


def test_scatter_draws_the_points(tmp_path):
    ring = torch.randn(300, 2)
    pictures.scatter(tmp_path / "a.png", {"real": ring, "generator": 0.5 * ring})
    pictures.scatter(tmp_path / "b.png", {"real": ring, "generator": torch.full((300, 2), math.nan)})
    assert blue(tmp_path / "a.png") > 1.3 * blue(tmp_path / "b.png") > 100
    width, height = Image.open(tmp_path / "a.png").size
    assert width > 1.5 * height
    with pytest.raises(ValueError, match="'generator' has"):
        pictures.scatter(tmp_path / "c.png", {"generator": torch.zeros(3, 3)})
    with pytest.raises(ValueError, match="at least one"):
        pictures.scatter(tmp_path / "c.png", {})
    assert not (tmp_path / "c.png").exists()


ROWS = [
    {"step": step, "generator_loss": 0.1 / step, "fake_score_loss": 0.3, "drift_rms": 0.2, "z_rms": 1.0, "skipped": 0}
    for step in range(1, 40)
]


def test_curves(tmp_path):
    pictures.curves(tmp_path / "a.png", ROWS)
    bad = [{**row, "generator_loss": value} for row, value in zip(ROWS, [None, math.nan, math.inf] * 13, strict=True)]
    pictures.curves(tmp_path / "b.png", [{"phase": "teacher"}, *bad])
    assert blue(tmp_path / "a.png") > 100
    with pytest.raises(ValueError, match="nothing to plot"):
        pictures.curves(tmp_path / "c.png", [{"step": 1, "loss": 2.0}])


def test_the_running_mean_passes_gaps_over():
    values = [float(i) for i in range(20)]
    assert pictures._running_mean(values) == [0.0, *(i - 0.5 for i in range(1, 20))]
    assert pictures._running_mean([1.0] * 9 + [math.nan] + [3.0] * 10)[8:11] == [1.0, 1.0, 3.0]
    assert math.isnan(pictures._running_mean([math.nan])[0])


METRICS = {
    "frechet": {"generator": 4.5, "real": 3.0, "init": 24.0, "teacher": 3.6},
    "recall": {"real": 0.9, "teacher": 0.85, "init": 0.0512, "generator": 0.84},
    "accuracy": {"real": 1.0, "teacher": 0.99},
    "n": 599,
    "seed": 7,
    "steps": 300,
    "seconds": {"teacher": 50.25, "distil": 70.0},
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.toml").write_text('task = "digits"\n\n[emd]\nlangevin_steps = 4\n')
    (tmp_path / "metrics.json").write_text(json.dumps(METRICS))
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS) + '{"step": 4')
    for name in ("generator", "extra", "real", "teacher"):
        pictures.save_grid(tmp_path / "samples" / f"{name}.png", torch.zeros(4, 1, 8, 8))
    return tmp_path


def row(text, start):
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {start}")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_the_report_of_a_whole_run(folder):
    path = report.write(folder)
    assert path == folder / "report.md"
    text = path.read_text()
    header = [line for line in text.splitlines() if line.startswith("|  |")]
    assert header == ["|  | real | teacher | init | generator |"]
    assert row(text, "Fréchet distance (lower") == ["3", "3.60", "24", "4.50"]
    assert row(text, "Fréchet distance over") == ["1", "1.20", "8", "1.50"]
    assert row(text, "recall") == ["0.9", "0.85", "0.0512", "0.84"]
    assert row(text, "class accuracy") == ["1", "0.99", "-", "-"]
    assert "n = 599, seed = 7" in text
    assert row(text, "teacher |") == ["50.2"] or row(text, "teacher |") == ["50.3"]
    assert row(text, "total") == ["120.2"]
    assert "langevin_steps = 4" in text
    places = [text.index(f"(samples/{name}.png)") for name in ("real", "teacher", "generator", "extra")]
    assert places == sorted(places)
    assert "![losses, drift and z, gradient norms](curves.png)" in text and (folder / "curves.png").exists()
    assert "held-out real digits" in text
    # Every picture that it shows is there.
    for link in text.split("](")[1:]:
        assert (folder / link.split(")")[0]).exists()


def test_the_report_of_a_run_that_stopped(folder):
    (folder / "metrics.json").unlink()
    (folder / "log.jsonl").write_text("")
    text = report.write_stopped(folder, "the RMS of z is 12").read_text()
    assert "**This run stopped before its end: the RMS of z is 12**" in text
    assert "no metrics" in text and "curves.png" not in text and "langevin_steps = 4" in text


def test_the_report_of_a_mixture_and_of_an_empty_folder(tmp_path):
    assert "no metrics" in report.write(tmp_path).read_text()
    (tmp_path / "config.toml").write_text('task = "gmm"\n')
    mass = {"real": [0.5, 0.5], "generator": [0.25, 0.75]}
    modes, frechet = {"real": 2, "generator": 1}, {"generator": 0.125}
    metrics = {"modes": modes, "mass": mass, "due": mass, "frechet": frechet, "n": 10}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    text = report.write(tmp_path).read_text()
    assert row(text, "modes found") == ["2", "1"] and row(text, "mass by mode") == ["0.5 0.5", "0.25 0.75"]
    assert "exact samples of the mixture" in text and "| due" not in text and "over that of" not in text


def test_a_report_without_matplotlib_says_so(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    text = report.write(folder).read_text()
    assert "There are no curves: pictures and reports need Pillow and matplotlib" in text
    assert row(text, "recall")


def test_what_cannot_be_read(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no run folder"):
        report.write(tmp_path / "nowhere")
    before = report.write(folder).read_text()
    for text in ("{", "[1, 2]"):
        (folder / "metrics.json").write_text(text)
        with pytest.raises(ValueError, match=r"metrics\.json"):
            report.write(folder)
    assert (folder / "report.md").read_text() == before
