"""Detectors, references, images and CLIP models from files: those that are, and those that are something else."""

import io
import json
import math
import pickle
import zipfile

import detector_files as files
import diffusers_folders
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from watch import PROCESSES, Runs, one_line, watched

from emd_fast.metrics import reference
from emd_fast.metrics.detector import Detector, DetectorError
from emd_fast.metrics.distance import Moments, RunningMoments, frechet_of_moments
from emd_fast.metrics.images import ImageFiles, to_uint8
from emd_fast.metrics.reference import BadReference


@pytest.mark.parametrize("channels", [1, 3])
def test_a_torchscript_detector(tmp_path, channels):
    detector = Detector(files.detector(tmp_path / "d.pt"))
    images = files.pictures(channels=channels)
    np.testing.assert_allclose(detector.features(images), files.features_of(images), rtol=1e-5, atol=1e-6)
    assert detector.has_classes
    probabilities = detector.probabilities(images)
    plain = files.Detector()(images.expand(-1, 3, -1, -1), no_output_bias=True)
    torch.testing.assert_close(probabilities, plain)
    assert len(detector.sha256) == 64


class TakesNoFeatures(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float()


class Wrong(nn.Module):
    def forward(self, x: Tensor, return_features: bool = False) -> Tensor:
        return x.float()


class Fails(nn.Module):
    def forward(self, x: Tensor, return_features: bool = False) -> Tensor:
        return x.float() @ torch.ones(2, 2)


def archive(path, **entries):
    with zipfile.ZipFile(path, "w") as made:
        for name, content in entries.items():
            made.writestr(name, content)
    return path


def damaged(path):
    """A whole archive, whose program is not one."""
    source = io.BytesIO(files.detector(path).read_bytes())
    with zipfile.ZipFile(source) as whole, zipfile.ZipFile(path, "w") as made:
        for name in whole.namelist():
            made.writestr(name, b"def forward(" if name.endswith(".py") else whole.read(name))
    return path


def written(path, content):
    path.write_bytes(content)
    return path


def scripted(path, module):
    torch.jit.script(module).save(str(path))
    return path


def old(path):
    torch.save({"a": 1}, path, _use_new_zipfile_serialization=False)


NO_PROGRAM, NO_TORCHSCRIPT = "is an archive, but no program", "is no detector: it must be TorchScript"
NO_DETECTORS = {
    "nothing": (lambda path: path, "there is no detector file"),
    "a folder": (lambda path: path.mkdir(), "there is no detector file"),
    "empty": (lambda path: written(path, b""), NO_TORCHSCRIPT),
    "text": (lambda path: written(path, b"hello"), NO_TORCHSCRIPT),
    "a pickle": (lambda path: written(path, pickle.dumps({"a": Runs()})), "inception-2015-12-05.pt"),
    "weights of torch": (lambda path: torch.save({"weights": torch.ones(2)}, path), NO_PROGRAM),
    "weights of old torch": (old, "is a pickle"),
    "images": (lambda path: archive(path, **{"a/b.png": b""}), NO_PROGRAM),
    "a hollow archive": (lambda path: archive(path, **{"d/constants.pkl": b""}), "cannot read the detector"),
    "a hollow program": (lambda path: archive(path, **{"d/archive_format": b"pt2"}), "whose loader runs pickles"),
    "truncated": (lambda path: written(path, files.detector(path).read_bytes()[:1000]), "is no detector"),
    "damaged": (damaged, "cannot read the detector"),
    "another forward": (lambda path: scripted(path, TakesNoFeatures()), "its forward takes no return_features"),
}


@pytest.mark.parametrize("name", NO_DETECTORS)
def test_what_is_no_detector(tmp_path, name):
    make, said = NO_DETECTORS[name]
    make(tmp_path / "file.pt")
    with watched(PROCESSES), pytest.raises(DetectorError) as caught:
        Detector(tmp_path / "file.pt")
    assert said in one_line(caught, tmp_path / "file.pt")


@pytest.mark.parametrize(
    ("module", "said"), [(Wrong(), r"must return (12, D) for 12 images, got (12, 3, 8, 8)"), (Fails(), "fails on")]
)
def test_a_program_that_is_no_detector(tmp_path, module, said):
    detector = Detector(scripted(tmp_path / "d.pt", module))
    with pytest.raises(DetectorError) as caught:
        detector.features(files.pictures())
    assert said in one_line(caught, tmp_path / "d.pt")


@pytest.fixture
def features():
    return files.features_of(files.pictures(60))


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_edms_npz(tmp_path, features, dtype):
    mu, sigma = (array.astype(dtype) for array in files.statistics(features))
    np.savez(tmp_path / "r.npz", mu=mu, sigma=sigma)
    found = reference.load(tmp_path / "r.npz")
    moments = found.of_width(files.FEATURES)
    assert np.array_equal(moments.mean, mu) and np.array_equal(moments.covariance, sigma)
    assert moments.n is None and found.shape is None and found.detector is None
    with pytest.raises(BadReference, match=r"has statistics of 6 \(fid\) features, the detector gives 2048"):
        found.of_width(2048)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_edm2s_pkl(tmp_path, features, protocol, monkeypatch):
    path = files.edm2_pkl(tmp_path / "r.pkl", features, protocol)
    monkeypatch.setattr(pickle, "load", lambda *_: pytest.fail("a pickle was loaded"))
    found = reference.load(path)
    assert set(found.moments) == {"fid", "fd_dinov2"}
    moments = found.of_width(files.FEATURES)
    assert moments.n == 60
    mu, sigma = files.statistics(features)
    assert np.array_equal(moments.mean, mu) and np.array_equal(moments.covariance, sigma)
    assert len(found.of_width(4).mean) == 4


def test_a_reference_that_was_written_here(tmp_path, features):
    sums = RunningMoments()
    sums.add(torch.from_numpy(features))
    reference.save(tmp_path / "r.npz", sums.moments(), (3, 8, 8), "abc")
    found = reference.load(tmp_path / "r.npz")
    assert found.shape == (3, 8, 8) and found.detector == "abc" and found.of_width(files.FEATURES).n == 60
    again = Moments(*map(torch.from_numpy, files.statistics(features)))
    assert frechet_of_moments(found.of_width(files.FEATURES), again) < 1e-9
    found.check((1, 8, 8), "abc")
    with pytest.raises(BadReference, match="images of 3x8x8, these are of 3x16x16; nothing is resized"):
        found.check((3, 16, 16), "abc")
    with pytest.raises(BadReference, match=r"made with the detector abc\.\.\., this is xyz"):
        found.check((3, 8, 8), "xyz")


MU, SIGMA, NAN = np.zeros(3), np.eye(3), np.full(3, np.nan)
ARRAYS = {
    "it has mean, and no mu or sigma": [{"mean": MU}],
    "it has mu, and no sigma": [{"mu": MU}],
    "must fit, got (3,) and (4, 4)": [{"mu": MU, "sigma": np.eye(4)}],
    "must fit": [{"mu": SIGMA, "sigma": SIGMA}, {"mu": np.zeros(0), "sigma": np.zeros((0, 0))}],
    "must be finite": [{"mu": NAN, "sigma": SIGMA}, {"mu": MU, "sigma": SIGMA + math.inf}],
    "mu must be an array of floating-point": [{"mu": MU.astype(int), "sigma": SIGMA}],
    "must be symmetric": [{"mu": MU, "sigma": np.triu(np.ones((3, 3)))}],
    "is no reference": [{"mu": np.array([Runs()], object), "sigma": SIGMA}],
}
PICKLES = {
    "nothing was run": {"fid": Runs()},
    "it holds no table": 3,
    "no entry with mu and sigma": {"a": 1},
    "mu must be an array": {"fid": {"mu": [0.0], "sigma": [[1.0]]}},
    "is no reference": {"fid": {"mu": np.array([None]), "sigma": SIGMA}},
}
WHOLE = {"mu": MU, "sigma": SIGMA}
NO_REFERENCES = [
    (lambda path: path, "there is no reference"),
    *((lambda path, content=content: written(path, content), "is no reference") for content in (b"hello", b"")),
    *((lambda path, a=a: np.savez(path, **a), said) for said, each in ARRAYS.items() for a in each),
    *((lambda path, v=value: written(path, pickle.dumps(v)), said) for said, value in PICKLES.items()),
    (lambda path: written(path, pickle.dumps({"fid": WHOLE})[:-20]), "is no reference"),
    (lambda path: archive(path, **{"a.png": b""}), "is no reference"),
    (lambda path: np.savez(path, **WHOLE) or written(path, path.read_bytes()[40:]), "is no reference"),
]


@pytest.mark.parametrize(("make", "said"), NO_REFERENCES, ids=range(len(NO_REFERENCES)))
def test_what_is_no_reference(tmp_path, make, said):
    make(tmp_path / "file.npz")
    with watched(PROCESSES), pytest.raises(BadReference) as caught:
        reference.load(tmp_path / "file.npz")
    assert said in one_line(caught, tmp_path / "file.npz")


def test_uint8_by_edms_rule():
    x = torch.tensor([-2.0, -1.0, -0.999, 0.0, 0.0039, 0.996, 0.9999, 1.0, 3.0]).reshape(1, 1, 3, 3)
    expected = (x.numpy() * np.float32(127.5) + 128).clip(0, 255).astype(np.uint8)
    assert np.array_equal(to_uint8(x), expected) and to_uint8(x).flatten().tolist()[:2] == [0, 0]
    with pytest.raises(ValueError, match="must be finite"):
        to_uint8(x / 0)
    with pytest.raises(ValueError, match=r"\(n, 1 or 3, H, W\), got \(1, 4, 2, 2\)"):
        to_uint8(torch.zeros(1, 4, 2, 2))


@pytest.mark.parametrize("channels", [1, 3])
def test_images_from_a_folder_and_from_a_zip(tmp_path, channels):
    images = files.pictures(12, channels)
    folder = files.folder(tmp_path / "images", images)
    for source in (folder, files.zipped(tmp_path / "images.zip", folder)):
        found = ImageFiles(source)
        assert len(found) == 12 and found.shape == (channels, 8, 8)
        assert torch.equal(found(0, 12), images) and torch.equal(found(3, 4), images[3:7])


def test_images_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="neither a folder nor a"):
        ImageFiles(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="there is no image in"):
        ImageFiles(tmp_path)
    files.folder(tmp_path, files.pictures(3))
    for make, said in (
        (lambda path: Image.new("RGB", (9, 8)).save(path), r"z\.png is 8x9, .* is 8x8; nothing is resized"),
        (lambda path: Image.new("RGBA", (8, 8)).save(path), r"z\.png has mode RGBA"),
        (lambda path: path.write_bytes(b"no"), r"cannot read the image .*z\.png"),
    ):
        make(tmp_path / "z.png")
        with pytest.raises(ValueError, match=said) as caught:
            ImageFiles(tmp_path)(0, 4)
        one_line(caught, tmp_path)


@pytest.mark.skipif(diffusers_folders.transformers_missing() is not None, reason="transformers is not installed")
def test_the_clip_score(tmp_path):
    from transformers import CLIPModel, CLIPProcessor

    from emd_fast.metrics.clip import ClipScore

    folder = files.clip(tmp_path / "clip")
    images, prompts = files.pictures(4, size=20), ["a b", "c", "d e f", "a " * 40]
    scores = ClipScore(folder)(images, prompts)
    model, processor = CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)
    expected = []
    for image, prompt in zip(images, prompts, strict=True):
        words = processor(text=prompt, return_tensors="pt", truncation=True)
        pixels = processor(images=image.permute(1, 2, 0).numpy(), return_tensors="pt")
        with torch.no_grad():
            output = model(**words, **pixels)
        a, b = output.image_embeds[0].double(), output.text_embeds[0].double()
        expected.append(100 * max(0.0, float(a @ b / a.norm() / b.norm())))
    assert scores.dtype == torch.float64
    assert scores.tolist() == pytest.approx(expected, abs=1e-3)
    assert 0 in expected and max(expected) > 1  # both sides of the max are seen
    assert len(ClipScore(folder)(files.pictures(2, channels=1, size=20), ["a", "b"])) == 2
    with pytest.raises(ValueError, match="a prompt for each image, got 1 for 4"):
        ClipScore(folder)(images, ["a"])


@pytest.mark.skipif(diffusers_folders.transformers_missing() is not None, reason="transformers is not installed")
def test_a_folder_without_a_clip_model(tmp_path):
    from emd_fast.metrics.clip import ClipScore

    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    for folder in (tmp_path, tmp_path / "nowhere", tmp_path / "bert"):
        with pytest.raises(ValueError, match="holds no CLIP model") as caught:
            ClipScore(folder)
        one_line(caught, folder)
