"""The task "fashion" on tiny IDX files: what is read, what is refused, what is cached, and a whole run."""

import gzip
import json

import pytest
import torch
from helpers import threads

from emd_fast import config
from emd_fast.config import TeacherConfig
from emd_fast.run import distill
from emd_fast.tasks import fashion_data, image_cache, image_classifier, image_teacher
from emd_fast.tasks.fashion import Fashion, Judge
from emd_fast.tasks.image_classifier import ImageFeatures
from emd_fast.tasks.image_metrics import METRICS
from emd_fast.train.checkpoint import CheckpointError

FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
TINY = {"teacher.steps": 2, "teacher.channels": 4, "fashion.classifier_steps": 2, "emd.steps": 2}
TINY |= {"emd.batch_size": 4, "emd.langevin_steps": 1}
CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """A cache of its own, the CPU, and one thread: on shared cores a second one makes small networks slow."""
    monkeypatch.setenv(image_cache.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr("emd_fast.tasks.fashion.distributed.default_device", lambda: CPU)
    monkeypatch.delenv(fashion_data.VARIABLE, raising=False)
    with threads(1):
        yield


def idx(array, magic=None):
    magic = 0x800 + array.dim() if magic is None else magic
    header = b"".join(number.to_bytes(4, "big") for number in (magic, *array.shape))
    return header + array.numpy().tobytes()


def written(folder, train=40, test=20, seed=0, packed=False):
    """Writes images whose class shows in their brightness. Returns the folder."""
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir(exist_ok=True)
    for part, n in (("train", train), ("t10k", test)):
        labels = torch.arange(n) % 10
        noise = torch.randint(0, 20, (n, 28, 28), generator=generator)
        images = (labels[:, None, None] * 20 + noise).to(torch.uint8)
        for name, array in (("images-idx3", images), ("labels-idx1", labels.to(torch.uint8))):
            content = idx(array)
            path = folder / f"{part}-{name}-ubyte"
            if packed:
                path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(content))
            else:
                path.write_bytes(content)
    return folder


def settings(folder, **changes):
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    return config.load("fashion", {**TINY, "fashion.data": str(folder), **changes})


def test_files_are_read_packed_or_not_and_averaged(tmp_path):
    plain, packed = written(tmp_path / "plain"), written(tmp_path / "packed", packed=True)
    whole = fashion_data.read(plain, "train")
    assert whole.images.shape == (40, 28, 28) and whole.labels.tolist() == [i % 10 for i in range(40)]
    images, labels = fashion_data.data(str(packed), 28).load("train")
    assert images.shape == (40, 1, 28, 28) and images.dtype == torch.float32 and labels.dtype == torch.int64
    torch.testing.assert_close(images[:, 0], whole.images / 127.5 - 1)
    small, _ = fashion_data.data(str(packed), 14).load("test")
    whole, _ = fashion_data.data(str(packed), 28).load("test")
    means = whole.reshape(20, 1, 14, 2, 14, 2).mean((3, 5))
    torch.testing.assert_close(small, means)
    assert fashion_data.digest(plain) == fashion_data.digest(packed)
    assert fashion_data.digest(plain) != fashion_data.digest(written(tmp_path / "other", seed=1))


def test_the_folder_is_named_or_found(tmp_path, monkeypatch):
    assert str(fashion_data.place_of("")) == fashion_data.FOLDER
    monkeypatch.setenv(fashion_data.VARIABLE, str(tmp_path))
    assert fashion_data.place_of("") == tmp_path and str(fashion_data.place_of("x")) == "x"


def no_folder(folder):
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def changed(name, change):
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def replaced(name, array):
    return lambda folder: (folder / name).write_bytes(idx(array.to(torch.uint8)))


def damaged_gzip(folder):
    path = folder / FILES[0]
    path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes())[:-20])
    path.unlink()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (no_folder, "there is no folder .*: give --data FOLDER, set EMD_FAST_FASHION, or install"),
        (lambda folder: (folder / FILES[1]).unlink(), "has no file train-labels-idx1-ubyte or train-labels.*gz"),
        (
            changed(FILES[0], lambda content: content[:-1]),
            "is truncated or damaged: it has 31,375 bytes",
        ),
        (changed(FILES[0], lambda content: content[:3]), "train-images.* is truncated or damaged: it has 3 bytes"),
        (changed(FILES[3], lambda content: content + b"x"), "t10k-labels.* is truncated or damaged"),
        (
            changed(FILES[2], lambda content: b"\0\0\x08\x01" + content[4:]),
            "number is 0x00000801, not 0x00000803",
        ),
        (
            lambda folder: (folder / FILES[3]).write_bytes(idx(torch.zeros(19, dtype=torch.uint8))),
            "20 images, and .* 19",
        ),
        (lambda folder: (folder / FILES[1]).write_bytes(idx(torch.full((40,), 10, dtype=torch.uint8))), "the label 10"),
        (lambda folder: (folder / FILES[0]).write_bytes(idx(torch.zeros(40, 2, 28, dtype=torch.uint8))), "of 2x28"),
        (damaged_gzip, "cannot read .*train-images-idx3-ubyte.gz"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path, damage, said):
    folder = written(tmp_path / "data")
    damage(folder)
    with pytest.raises(fashion_data.BadData, match=said) as error:
        fashion_data.digest(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_the_command_line_refuses_before_it_trains(tmp_path, refused):
    refused(2, "there is no folder", "distill", "fashion", "--data", tmp_path / "none", "--out", tmp_path / "run")
    refused(2, "resolution must be 14 or 28, got 20", "distill", "fashion", "--resolution", 20)
    refused(2, "num_classes must be 10 for fashion", "distill", "fashion", "--num-classes", 3)
    refused(2, "label_dropout must be 0 without", "distill", "fashion", "--teacher.conditional", "false")
    four = ("--data", written(tmp_path / "data"), "--teacher.patch", 4, "--out", tmp_path / "run")
    refused(2, "teacher.patch must divide images of 14x14 pixels into 2x2 or more, got 4", "distill", "fashion", *four)
    for network in ("--teacher.patch", 14), ("--teacher.patch", 28):
        refused(2, "pixels into 2x2 or more, got", "distill", "fashion", *four[:2], *network)
    dit = ("distill", "fashion", "--teacher.network", "dit")
    remedy = "give --teacher.conditional true --teacher.label-dropout 0 --teacher.patch 1"
    refused(2, f'network = "dit" has no label dropout, and its own patches of 2 pixels: {remedy}', *dit)
    assert not (tmp_path / "run" / "teacher").exists()


def test_the_null_label_stands_for_no_class(tmp_path):
    data = fashion_data.data(str(written(tmp_path / "data")), 14)
    teacher = image_teacher.train(TeacherConfig(steps=3, channels=4, label_dropout=0.5), data)
    assert teacher.null_cond == 10
    x, t = torch.randn(2, 1, 14, 14), torch.ones(2)
    none = teacher(x, t)
    assert torch.equal(none, teacher(x, t, torch.tensor([10, 10])))
    assert not torch.equal(none, teacher(x, t, torch.tensor([0, 0])))
    for bad in (11, -1):
        with pytest.raises(ValueError, match=r"labels must be in \[0, 11\)"):
            teacher(x, t, torch.tensor([0, bad]))
    # Without dropout no image is trained as of no class, and the network has no such label.
    assert image_teacher.untrained(TeacherConfig(channels=4), data).null_cond is None


def test_dropout_trains_the_null_label(tmp_path):
    data = fashion_data.data(str(written(tmp_path / "data")), 14)
    short = TeacherConfig(steps=3, channels=4, label_dropout=0.5, warmup=0, ema=0.0)
    before, after = image_teacher.untrained(short, data), image_teacher.train(short, data)
    moved = (after.network.class_embedding.weight - before.network.class_embedding.weight).abs().amax(1)
    assert moved[10] > 0


def test_a_run_trains_its_classifier_and_its_references_once(tmp_path, monkeypatch):
    folder, trained = written(tmp_path / "data"), []
    train = image_classifier.trained
    monkeypatch.setattr(image_classifier, "trained", lambda *given: trained.append(given) or train(*given))
    metrics = distill.distill(settings(folder), tmp_path / "run")
    assert len(trained) == 1 and metrics["n"] == 20
    assert 0 <= metrics["classifier_accuracy"] <= 1
    for name in ("frechet", "precision", "recall", "inception_score", "total_variation", "recall_by_class"):
        assert set(metrics[name]) == {"real", "teacher", "init", "generator"}, name
    assert set(metrics["accuracy"]) == {"real", "teacher", "init", "generator"}
    assert len(metrics["recall_by_class"]["generator"]) == 10
    assert sum(metrics["recall_by_class"]["real"]) / 10 == pytest.approx(metrics["recall"]["real"])
    assert "recall by class" in (tmp_path / "run" / "report.md").read_text()
    assert {path.stem for path in (tmp_path / "run" / "samples").glob("*.png")} >= {"real", "teacher", "generator"}
    # Another process: the same numbers from the cache; another resolution has a classifier of its own.
    again = Judge(folder, 14, 2, CPU)
    assert len(trained) == 1 and again.accuracy == metrics["classifier_accuracy"]
    assert again.real()["frechet"] == metrics["frechet"]["real"]
    Judge(folder, 28, 2, CPU)
    assert len(trained) == 2


def test_what_is_cached_is_what_is_computed(tmp_path):
    folder = written(tmp_path / "data")
    first = Judge(folder, 14, 2, CPU)
    real = first.real()
    for entry in (tmp_path / "cache").iterdir():
        for file in entry.glob("*.bin") if entry.is_dir() else ():
            file.write_bytes(file.read_bytes()[:-1])  # damaged: made again
    again = Judge(folder, 14, 2, CPU)
    assert again.real() == real and torch.equal(again.reference.features, first.reference.features)


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv(image_cache.VARIABLE, str(tmp_path / "file"))
    made = []
    for _ in range(2):
        found = image_cache.cached("thing", {"a": 1}, lambda: made.append(1) or {"value": 3})
        assert found["value"] == 3
    assert len(made) == 2


def test_a_generator_without_classes(tmp_path):
    folder = written(tmp_path / "data")
    metrics = distill.distill(settings(folder, emd__num_classes=0), tmp_path / "run")
    assert set(metrics["accuracy"]) == {"real"}
    assert len(metrics["recall_by_class"]["generator"]) == 10


def test_guidance_reaches_the_teachers_samples(tmp_path):
    folder = written(tmp_path / "data")
    plain = distill.distill(settings(folder), tmp_path / "plain")
    guided = distill.distill(settings(folder, emd__guidance=4.0), tmp_path / "guided")
    assert plain["frechet"]["teacher"] != guided["frechet"]["teacher"]


def test_interim_metrics_are_those_of_the_end(tmp_path):
    folder = written(tmp_path / "data")
    chosen = settings(folder, evaluation__every=8)
    metrics = distill.distill(chosen, tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    (row,) = (row for row in rows if "evaluation_frechet" in row)
    for name in METRICS:
        assert row[f"evaluation_{name}"] == metrics[name]["generator"], name


def test_the_best_checkpoint_depends_on_the_judge_and_the_teacher_on_the_images_alone(tmp_path, monkeypatch):
    folder = written(tmp_path / "data")
    task = Fashion(settings(folder))
    assert task.images() == {"data": fashion_data.digest(folder)}
    assert task.basis().items() > task.images().items()
    assert task.basis() == task._judge.key
    before = task.basis()
    assert Fashion(settings(folder, fashion__classifier_steps=3)).basis() != before
    monkeypatch.setattr("emd_fast.tasks.fashion._NOISE", 0.3)
    assert task.basis() != before
    before = task.basis()
    monkeypatch.setattr("emd_fast.tasks.fashion.distributed.default_device", lambda: torch.device("cuda"))
    assert task.basis() != before


def test_the_words_of_the_command_line(tmp_path, call):
    words = [f"--{key.replace('emd.', '').replace('_', '-')}={value}" for key, value in TINY.items()]
    folder = written(tmp_path / "data")
    code, said, _ = call("distill", "fashion", "--data", folder, "--resolution", 14, "--out", tmp_path / "run", *words)
    assert code == 0 and said.endswith("report.md\n")


def test_a_run_does_not_go_on_with_other_images(tmp_path):
    one, other = written(tmp_path / "one"), written(tmp_path / "other", seed=1)
    Fashion(settings(one)).make_teacher(tmp_path, None)
    again = Fashion(settings(other))
    again.make_teacher(tmp_path, None)  # to sample, which needs no images
    with pytest.raises(CheckpointError, match="trained on other images"):
        again.open_references()
    again = Fashion(settings(other))
    again.open_references()
    with pytest.raises(CheckpointError, match="trained on other images"):
        again.make_teacher(tmp_path, None)
    again = Fashion(settings(written(tmp_path / "moved", packed=True)))
    again.open_references()
    again.make_teacher(tmp_path, None)


def test_what_a_gpu_computed_is_kept_apart(tmp_path, monkeypatch):
    folder, trained = written(tmp_path / "data"), []
    train = image_classifier.trained

    def recorded(data, training, device):
        trained.append(device.type)
        return train(data, training)

    monkeypatch.setattr(image_classifier, "trained", recorded)
    monkeypatch.setattr(
        "emd_fast.tasks.fashion.ImageFeatures", lambda network, shape, device: ImageFeatures(network, shape)
    )
    for device in (CPU, META, CPU):
        Judge(folder, 14, 2, device)
    assert trained == ["cpu", "meta"]


def test_other_tasks_have_no_folder_of_images(refused):
    refused(2, "for the task fashion", "distill", "digits", "--data", "images")
