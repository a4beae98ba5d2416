"""Evaluation by a detector: of images in files, of runs, of what was exported, on one rank and on several."""

import json

import detector_files as files
import diffusers_folders
import numpy as np
import pytest
import torch

from emd_fast import Denoiser, EMDConfig, EMDTrainer, schedules
from emd_fast.io import code
from emd_fast.metrics import evaluation
from emd_fast.metrics.images import ImageFiles, to_uint8
from emd_fast.run import distill
from emd_fast.teachers.small_unet import SmallUNet, initialise

TINY = ["--steps=2", "--batch-size=4", "--langevin-steps=1", "--fake-score-updates=1", "--lr-warmup=0", "--samples=20"]


pytestmark = pytest.mark.usefixtures("without_pictures")


@pytest.fixture
def told(call):
    """What a command that succeeds prints, as JSON where it is."""

    def run(*words):
        code, out, err = call(*words)
        assert code == 0, err
        return json.loads(out) if out.startswith("{") else out

    return run


def edm_distance(a, b):
    """fid.py's, in numpy; the roots of the eigenvalues of the product are those of its matrix root."""
    (mu, sigma), (mu_ref, sigma_ref) = files.statistics(a), files.statistics(b)
    roots = np.sqrt(np.linalg.eigvals(sigma @ sigma_ref).astype(complex)).real.sum()
    return float(np.square(mu - mu_ref).sum() + np.trace(sigma + sigma_ref) - 2 * roots)


@pytest.fixture
def there(tmp_path):
    """A detector, twenty real images, and their statistics made by another formulation."""
    real = files.pictures(20, seed=1)
    files.detector(tmp_path / "d.pt")
    files.folder(tmp_path / "real", real)
    files.npz(tmp_path / "r.npz", files.features_of(real))
    return files.features_of(real)


def test_images_against_a_reference(told, there, tmp_path):
    made = files.pictures(23) // 2
    files.folder(tmp_path / "made", made)
    words = ["evaluate", "made", "--detector", "d.pt", "--reference", "r.npz"]
    metrics = told(*words)
    assert metrics["frechet"] == pytest.approx(edm_distance(files.features_of(made), there), abs=1e-3)
    assert metrics["frechet"] > 0.1 and metrics["n"] == 23
    assert metrics["inception_score"] > 1
    assert {len(metrics[name]["sha256"]) for name in ("detector", "reference")} == {64}
    assert "n = 23 is below 50,000" in metrics["warning"]
    for size in (1, 7, 23):
        assert told(*words, "--batch-size", size)["frechet"] == pytest.approx(metrics["frechet"], rel=1e-5)
    archive = files.zipped(tmp_path / "made.zip", tmp_path / "made")
    assert told("evaluate", archive, *words[2:])["frechet"] == metrics["frechet"]


def test_a_reference_that_the_command_wrote(told, refused, there, tmp_path):
    written = told("evaluate", "real", "--detector", "d.pt", "--write-reference", "w.npz")
    assert written["n"] == 20
    with np.load("w.npz") as ours, np.load("r.npz") as other:
        for name in ("mu", "sigma"):
            np.testing.assert_allclose(ours[name], other[name], rtol=1e-4, atol=1e-6)
    metrics = told("evaluate", "real", "--detector", "d.pt", "--reference", "w.npz")
    assert metrics["frechet"] == pytest.approx(0, abs=1e-9)
    assert metrics["reference"]["sha256"] == written["reference"]["sha256"]
    files.folder(tmp_path / "large", files.pictures(20, size=9))
    said = "of images of 3x8x8, these are of 3x9x9; nothing is resized here"
    refused(2, said, "evaluate", "large", "--detector", "d.pt", "--reference", "w.npz")


def test_precision_and_recall_against_images(told, refused, there, tmp_path):
    files.folder(tmp_path / "made", files.pictures(20) // 2 + 60)
    words = ["evaluate", "made", "--detector", "d.pt", "--compare-with", "real"]
    metrics = told(*words)
    a, b = there, files.features_of(files.pictures(20) // 2 + 60)

    def share(samples, manifold):
        others = np.linalg.norm(manifold[:, None] - manifold[None], axis=2)
        radii = np.sort(others, axis=1)[:, 3]
        return (np.linalg.norm(samples[:, None] - manifold[None], axis=2) <= radii).any(1).mean()

    assert (metrics["precision"], metrics["recall"]) == pytest.approx((share(b, a), share(a, b)))
    assert 0 < metrics["recall"] < 1
    assert metrics["compare_with"]["sha256"] == ImageFiles("real").sha256
    files.folder(tmp_path / "fewer", files.pictures(19))
    refused(2, "compare sets of one size: fewer has 19 images, 20 are generated", *words[:-1], "fewer")
    files.folder(tmp_path / "large", files.pictures(20, size=9))
    refused(2, "large has images of 3x9x9, these are of 3x8x8", *words[:-1], "large")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere", "--detector", "d.pt"], "nowhere is neither a folder nor a .zip of images"),
        (["real", "--detector", "nothing.pt"], "there is no detector file nothing.pt"),
        (["real", "--detector", "r.npz"], "r.npz is an archive, but no program"),
        (["real", "--detector", "d.pt", "--reference", "d.pt"], "d.pt is no reference"),
        (["real", "--detector", "d.pt", "--reference", "other.npz"], "statistics of 3 (fid) features, the detector"),
        (["real", "--reference", "r.npz"], "real is not the folder of a run"),
        (["real", "--detector", "d.pt", "--samples", "7"], "real has 20 images, --samples is 7"),
        (["real", "--detector", "d.pt", "--best"], "--best needs a run folder"),
        (["real", "--detector", "d.pt", "--clip", "x"], "--clip needs a run folder"),
        (["real", "--detector", "d.pt", "--write-reference", "x.txt"], "must end in .npz"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(call, there, words, said):
    np.savez("other.npz", mu=np.zeros(3), sigma=np.eye(3))
    got, out, err = call("evaluate", *words)
    lines = [line for line in err.splitlines() if "20 images in real" not in line]
    assert (got, out) == (2, "") and said in err and len(lines) == 1, err


def small():
    """A teacher of one's own."""
    network = SmallUNet(3, channels=4, num_classes=0)
    initialise(network, 0)
    return Denoiser(network, schedules.EDM(), "edm", sigma_data=0.5, sample_shape=(3, 8, 8))


def test_a_run_by_a_detector(told, call, refused, there, tmp_path):
    words = ["distill", "--teacher", "test_evaluate:small", "--out", "run", *TINY]
    told(*words, "--detector", "d.pt", "--reference", "r.npz")
    first = json.loads((tmp_path / "run" / "metrics.json").read_text())
    with code.allow(words[2]):
        _, _, trainer = distill.open_run(tmp_path / "run")
    named = ("--teacher", words[2])
    expected = edm_distance(files.features_of(to_uint8(trainer.generate(20))), there)
    assert first["frechet"] == {"generator": pytest.approx(expected, abs=1e-3)}
    assert (first["n"], first["seed"]) == (20, 0)
    report = (tmp_path / "run" / "report.md").read_text()
    assert first["reference"]["sha256"] in report and "n = 20 is below 50,000" in report
    more = told("evaluate", "run", *named, "--detector", "d.pt", "--samples", "33")
    assert more["n"] == 33 and more["frechet"] != first["frechet"]
    compared = told("evaluate", "run", *named, "--detector", "d.pt", "--compare-with", "real")
    assert set(compared["precision"]) == {"generator"} and 0 <= compared["recall"]["generator"] <= 1
    assert compared["frechet"]["generator"] == pytest.approx(expected, abs=1e-3)
    assert "is finished" in call(*words)[2]
    told("sample", "run", *named, "-n", "20", "--out", "images")
    assert torch.equal(ImageFiles("images")(0, 20), to_uint8(trainer.generate(20)))
    again = told("evaluate", "images", "--detector", "d.pt", "--reference", "r.npz")
    assert again["frechet"] == pytest.approx(first["frechet"]["generator"], rel=1e-5)
    refused(2, "images exists already and is not empty", "sample", "run", *named, "-n", "2", "--out", "images")
    told("sample", "run", *named, "-n", "2", "--first", "18", "--out", "two")
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["000018.png", "000019.png"]
    assert torch.equal(ImageFiles("two")(0, 2), ImageFiles("images")(18, 2))
    told("export", "run", *named, "one.safetensors")
    exported = told("evaluate", "one.safetensors", "--detector", "d.pt", "--reference", "r.npz", "--samples", "20")
    assert exported["frechet"] == pytest.approx(first["frechet"]["generator"], abs=1e-9) and exported["seed"] == 0


def test_a_wrong_file_is_found_before_the_training(call, refused, there, tmp_path):
    np.savez("other.npz", mu=np.zeros(3), sigma=np.eye(3))
    words = ["distill", "--teacher", "test_evaluate:small", "--out", "run", *TINY]
    for extra, said in {
        ("--detector", "real"): "there is no detector file real",
        ("--detector", "d.pt", "--reference", "d.pt"): "d.pt is no reference",
        ("--detector", "d.pt", "--reference", "other.npz"): "statistics of 3 (fid) features, the detector gives 6",
        ("--reference", "r.npz"): "reference needs a detector",
        ("--evaluation.every", "8"): "evaluation.every needs a Fréchet distance: give --detector FILE and --reference",
        ("--evaluation.every", "-1"): "every must be at least 0, got -1",
        ("--clip", "real"): "holds no CLIP model",
    }.items():
        code, _, err = call(*words, *extra)
        assert code == 2 and said in err and len(err.strip().splitlines()) == 1, err
        assert not list((tmp_path / "run").glob("checkpoints/*"))
    said = "detector is for pretrained teachers; the task 'gmm' has its own figures"
    refused(2, said, "distill", "gmm", "--out", "g", "--detector", "d.pt")


@pytest.mark.slow
@pytest.mark.skipif(diffusers_folders.transformers_missing() is not None, reason="transformers is not installed")
def test_the_clip_score_of_a_run(told, call, tmp_path):
    from emd_fast.metrics.clip import ClipScore

    diffusers_folders.stable_diffusion(tmp_path / "teacher")
    clip = files.clip(tmp_path / "clip", seed=0)
    (tmp_path / "prompts.txt").write_text("a b\n\nc\nd e\n")
    words = ["--teacher", "teacher", "--prompts", "prompts.txt", "--guidance=2", *TINY[:-1], "--samples=7"]
    told("distill", *words, "--out", "run")
    metrics = told("evaluate", "run", "--clip", "clip")
    _, _, trainer = distill.open_run(tmp_path / "run")
    # In batches of the run's four, as it draws them: last digits depend on the batch, and a pixel's level on those.
    parts = [trainer.generate(n, first_sample=first) for first, n in ((0, 4), (4, 3))]
    images = torch.cat([to_uint8(trainer.teacher.decode(part)) for part in parts])
    prompts = ["a b", "c", "d e", "a b", "c", "d e", "a b"]
    expected = ClipScore(clip)(images, prompts).mean().item()
    assert metrics["clip_score"] == {"generator": pytest.approx(expected, abs=1e-3)}
    others = ClipScore(clip)(images, prompts[1:] + prompts[:1]).mean().item()
    assert abs(others - expected) > 0.1 and metrics["n"] == 7
    (tmp_path / "prompts.txt").write_text("a b\nc\n")
    said = "prompts.txt is not the text that run/prompts.safetensors was made with"
    assert said in call("evaluate", "run", "--clip", "clip")[2]


def evaluated(detector, reference, real, batch):
    """What every rank gets, and the global indices that this one drew."""
    trainer = EMDTrainer(small(), EMDConfig(steps=1, batch_size=4))
    drawn = []

    def images(first, n):
        drawn.extend(range(first, first + n))
        return to_uint8(trainer.generate(n, first_sample=first))

    evaluator = evaluation.Evaluator.read(detector, reference, real)
    return evaluation.evaluate(evaluator, images, 20, batch), drawn


def evaluated_with_a_failure(detector):
    def images(first, n):
        if first >= 10:
            raise ValueError("images must be finite: they hold NaN or infinite values")
        return files.pictures(n)

    try:
        evaluation.evaluate(evaluation.Evaluator.read(detector), images, 20, 5)
    except ValueError as error:
        return str(error)


@pytest.mark.slow
def test_the_numbers_do_not_depend_on_ranks_or_batches(ranks, there, tmp_path):
    paths = [str(tmp_path / name) for name in ("d.pt", "r.npz", "real")]
    alone, drawn = evaluated(*paths, 20)
    assert drawn == list(range(20)) and set(alone) >= {"frechet", "inception_score", "precision", "recall"}
    for batch in (3, 20):
        parts = ranks(3, evaluated, *paths, batch)
        # A rank with a smaller share may make its first image again, so that all make as many calls.
        assert [index for _, part in parts for index in dict.fromkeys(part)] == list(range(20))
        for found, _ in parts:
            assert found == pytest.approx(alone, abs=1e-6)
            assert found == parts[0][0]
    # An error that one rank meets is one of all; none waits for it.
    said = "images must be finite: they hold NaN or infinite values"
    assert ranks(3, evaluated_with_a_failure, paths[0]) == [f"{said} (rank 1)", said, said]


def test_too_few_samples(there, tmp_path):
    evaluator = evaluation.Evaluator.read(tmp_path / "d.pt")
    with pytest.raises(ValueError, match="at least 2 images a rank, got 1 for 1"):
        evaluation.evaluate(evaluator, lambda first, n: files.pictures(n), 1, 1)
    with pytest.raises(ValueError, match="needs a detector and a reference"):
        evaluation.frechet(evaluator, lambda first, n: files.pictures(n), 4, 4)


def shared() -> tuple[list, list]:
    calls = []
    found = evaluation._share(lambda first, n: calls.append((first, n)) or torch.arange(first, first + n), 5, 2)
    return [(first, x.tolist()) for first, x in found], calls


def test_ranks_make_images_equally_often_whatever_their_shares(ranks):
    (few, calls_of_few), (many, calls_of_many) = ranks(2, shared)
    assert few == [(0, [0, 1])] and many == [(2, [2, 3]), (4, [4])]
    assert len(calls_of_few) == len(calls_of_many) == 2
