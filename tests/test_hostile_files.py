"""Checkpoints, teachers, references and pickles of an attacker run nothing, exhaust nothing, and end in one line."""

import io
import json
import os
import pickle
import random
import shutil
import struct
import zipfile

import edm_files
import numpy as np
import pytest
import torch
from hostile_pickles import as_arguments, as_ema, call, saved, storage, text, whole
from torch import nn
from watch import Runs, at, bounded, fields, one_line, resigned, turned, watched

from emd_fast import Denoiser, EMDConfig, EMDTrainer, schedules
from emd_fast.config import TeacherConfig, to_dict
from emd_fast.io.pickles import PickleError
from emd_fast.metrics import reference
from emd_fast.metrics.reference import BadReference
from emd_fast.run.best import best_of_run
from emd_fast.tasks import image_teacher, labelled_images
from emd_fast.tasks.digits_data import DIGITS
from emd_fast.teachers import edm_pickle
from emd_fast.teachers.mlp import TimeMLP
from emd_fast.train import checkpoint, run_checkpoints
from emd_fast.train.checkpoint import CheckpointError


def test_the_watch_sees():
    for act in (lambda: exec("1"), lambda: os.system("true"), lambda: pickle.loads(pickle.dumps(nn.Linear))):
        with pytest.raises(AssertionError), watched():
            act()
    with pytest.raises(AssertionError), watched():
        open(os.devnull, "w").close()
    with pytest.raises(AssertionError), bounded(1):
        bytes(2**21)


def points_teacher():
    network = TimeMLP(2, 16, 1, seed=1)
    return Denoiser(network, schedules.EDM(), "edm", sigma_data=0.5, sample_shape=(2,))


TENSORS = {"generator.w": torch.arange(12.0).reshape(3, 4), "generator.n": torch.tensor(7), "ema.w": torch.ones(2)}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "x"
    checkpoint.Writer().save(path, TENSORS, {"step": 3})
    checkpoint.load(path)
    return path


@pytest.fixture
def copy(good, tmp_path):
    return shutil.copytree(good, tmp_path / "x")


def refused(path):
    """Reads it in every way; returns what was said."""
    said = set()
    for read in (checkpoint.load, checkpoint.facts, checkpoint.shapes):
        with watched(), bounded(50), pytest.raises(CheckpointError) as error:
            read(path)
        said.add(one_line(error, path))
    into = {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}
    with watched(), pytest.raises(CheckpointError) as error:
        checkpoint.restore(path, into)
    assert not any(tensor.any() for tensor in into.values())
    return " ".join({*said, one_line(error, path)})


def renamed(name, other):
    return lambda table: table["tensors"].update({other: table["tensors"].pop(name)})


BOMB = {"dtype": "uint8", "shape": [2**50], "chunks": [[0, 0, 2**50]]}
LONG = {**BOMB, "shape": [0, 2**59, 2**59], "chunks": []}
WRONG = {  # what is said: {field of the manifest, or of the entry of a tensor: wrong values}
    "fields": {"loader": ["os.system"], "version": ["3", True]},
    "facts": {"facts": [[]]},
    "files or tensors": {"tensors": [[]], "files": [{"../../etc/passwd": [1, "0" * 64]}]},
    "size and SHA-256": {
        "files": [[[x, "0" * 64]] for x in (-1, 2**70, True)] + [[["../x", 10, "0" * 64]], [[72, "../x"]]]
    },
    "the entry 'generator.w'": {"": [{"bytes": "gASV"}, []], "class": ["BytesStorageMetadata"]},
    "the dtype": {"dtype": ["load", "torch.float32", "__class__", ["float32"]]},
    "gaps|size": {"dtype": ["float64"], "": [BOMB], "chunks": [[[0, 2**40, 3]]]},
    "the shape": {
        "shape": ["34", ["3", "4"], [True, 12], [3.0, 4.0], [-3, -4], [1] * 500, [10**4000] * 500, [2**59, 2**59]],
        "": [LONG],
    },
    "the rows": {"shape": [[4, 3]], "chunks": [[]]},
    "chunks": {"chunks": [[[0, 0, 0]], [[0, 0, 4], [0, 0, -1]], [[0, -8, 3]], [[1, 0, 3]], [["../x", 0, 3]]]},
}  # fmt: skip


def entry(field, value):
    """Sets a field of the manifest, or of what it says of generator.w."""
    if field in ("loader", "version", "facts", "tensors", "files"):
        return at(field, value=value)
    return at("tensors", "generator.w", *([field] if field else []), value=value)


MANIFESTS = {
    **{
        f"{field or 'entry'}-{says}-{i}": (entry(field, value), says)
        for says, table in WRONG.items()
        for field, values in table.items()
        for i, value in enumerate(values)
    },
    "a field less": (at("files"), "fields"),
    "more elements, and the file says so": (
        lambda table: (entry("", BOMB)(table), at("files", 0, value=[2**50 + 16, "0" * 64])(table)), "gaps|size"
    ),
    "a chunk over another": (at("tensors", "ema.w", "chunks", 0, 1, value=0), "gaps"),
    "two tensors of one chunk": (
        at("tensors", "ema.x", value={"dtype": "float32", "shape": [2], "chunks": [[0, 56, 2]]}), "gaps"
    ),
    "a name without a part": (renamed("ema.w", "w"), "the name"),
    "a part that is a fact": (renamed("ema.w", "step.w"), "the name"),
}  # fmt: skip


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_that_lies_is_refused_before_anything_is_read(copy, name):
    change, says = MANIFESTS[name]
    resigned(copy, change)
    said = refused(copy)
    assert any(word in said for word in says.split("|")), said


def instead(path, target=None):
    path.unlink()
    os.mkfifo(path) if target is None else path.symlink_to(target)


MANIFEST = {
    "brackets": b"[" * 10**6,
    "nested facts": b'{"format": "emd_fast checkpoint", "facts": ' + b"[" * 10**5 + b"]" * 10**5 + b"}",
    "a number of a million digits": b'{"version": 1' + b"0" * 10**6 + b"}",
    "not UTF-8": b'{"\xff": 1}',
    "a pickle as the manifest": pickle.dumps(Runs()),
}
TWICE = b'"version": 3', b'"version": 3, "version": 3'
OTHERS = {  # the manifest and the tensors are something else
    **{name: lambda m, _, content=content: m.write_bytes(content) for name, content in MANIFEST.items()},
    "a manifest that is a fifo": lambda m, _: instead(m),
    "a manifest that never ends": lambda m, _: instead(m, "/dev/zero"),
    "a manifest of 1 TiB": lambda m, _: os.truncate(m, 2**40),
    "a key twice": lambda m, _: m.write_bytes(m.read_bytes().replace(*TWICE)),
    "a file that is missing": lambda m, _: resigned(m.parent, lambda table: table["files"].append([0, "0" * 64])),
    "a pickle as the tensors": lambda _, t: t.write_bytes(pickle.dumps(Runs())),
    "a file of torch as the tensors": lambda _, t: torch.save(Runs(), t),
    "tensors that are a fifo": lambda _, t: instead(t),
    "tensors that never end": lambda _, t: instead(t, "/dev/zero"),
    "tensors that are a folder": lambda _, t: (t.unlink(), t.mkdir()),
}


@pytest.mark.parametrize("name", OTHERS)
def test_files_that_are_something_else(copy, name):
    OTHERS[name](copy / "manifest.json", copy / "rank-00000.bin")
    for read in (checkpoint.load, checkpoint.facts):
        with watched(), bounded(50), pytest.raises(CheckpointError) as error:
            read(copy)
        one_line(error, copy)


def test_what_lies_beside_is_not_opened(copy):
    for name in (".metadata", "__0_0.distcp", "rank-00001.bin", "x.pt"):
        (copy / name).write_bytes(pickle.dumps(Runs()))
    with watched():
        assert checkpoint.load(copy)["step"] == 3


def test_bits_that_turn_are_named_and_not_used(good, copy):
    draw = random.Random(0)
    for name in ("manifest.json", "rank-00000.bin"):
        content = (good / name).read_bytes()
        for _ in range(40):
            (copy / name).write_bytes(turned(content, draw))
            for read in (checkpoint.load, checkpoint.facts):
                with pytest.raises(CheckpointError) as error:
                    read(copy)
                one_line(error, copy)
        (copy / name).write_bytes(content)
    assert checkpoint.load(copy)["step"] == 3


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("trained") / "x"
    trainer = EMDTrainer(points_teacher(), EMDConfig(steps=4, batch_size=4))
    trainer.step()
    trainer.save(path)
    return path


def moment(change):
    def of(table):
        names = (name for name in table["tensors"] if name.startswith("generator_optimizer."))
        change(table["tensors"], next(name for name in names if name.endswith("exp_avg_sq")))

    return of


NONE = {
    "config": ["os.system"], "config.__class__": ["x"], "config.steps": ["4", {"a": 1}], "step": ["4", -1, 2**80],
    "skipped": [float("nan")], "teacher": ["x", {"path": None}], "groups": [[]],
    "groups.generator": [[{"lr": 1e9}], []], "clipped": [[1, 2]], "clipped.generator": [[1], [2, 1], [-1, 1], ["0", 1]],
}  # fmt: skip
FACTS = fields(NONE, ["facts"]) | {
    "no facts": at("facts", value={}),
    "a moment of another parameter": moment(lambda there, name: there.update({name + ".x.y": there.pop(name)})),
    "a moment less": moment(lambda there, name: there.pop(name)),
    "an unknown moment": moment(lambda there, name: there.update({name + "__class__": there.pop(name)})),
    "a moment of another shape": moment(lambda there, name: there[name]["shape"].append(1)),
    "a moment of integers": moment(lambda there, name: there[name].update(dtype="int32")),
}


@pytest.mark.parametrize("name", FACTS)
def test_a_trainer_takes_no_other_facts(trained, tmp_path, name):
    path = shutil.copytree(trained, tmp_path / "x")
    resigned(path, FACTS[name])
    with pytest.raises(CheckpointError) as error:
        EMDTrainer.resume(path, points_teacher())
    one_line(error, path)


@pytest.mark.parametrize("notes", [None, 3, {}, {"figures": 3}, {"figures": {"frechet": "x"}, "basis": {}}])
def test_the_best_checkpoint_says_how_it_was_judged(good, tmp_path, notes):
    path = shutil.copytree(good, run_checkpoints.best_of(tmp_path / "checkpoints"))
    resigned(path, at("facts", "notes", value=notes))
    assert best_of_run(tmp_path) is None


def test_a_teacher_that_was_damaged_is_named_and_not_used(tmp_path):
    config = TeacherConfig()
    teacher = image_teacher.untrained(config, DIGITS)
    path, draw = tmp_path / "teacher", random.Random(1)
    checkpoint.save(path, {"config": to_dict(config), "teacher": teacher.state_dict()})
    read = labelled_images.read_teacher(path, config, DIGITS)[0].state_dict()
    assert all(torch.equal(read[name], value) for name, value in teacher.state_dict().items())
    remedy = "remove it to train the teacher again"
    for name in ("manifest.json", "rank-00000.bin"):
        content = (path / name).read_bytes()
        for _ in range(20):
            (path / name).write_bytes(turned(content, draw))
            with pytest.raises(CheckpointError, match=remedy + "|has format version") as error:
                labelled_images.read_teacher(path, config, DIGITS)
            one_line(error, path)
        (path / name).write_bytes(content)
    for change in (
        at("facts", "config", value=3),
        at("facts", "config", "steps", value="x"),
        at("facts", value={"config": to_dict(config), "other": 1}),
        lambda table: table["tensors"].update({"x.y": table["tensors"].pop(next(iter(table["tensors"])))}),
        lambda table: table.update(tensors={}, files=[], facts={"config": to_dict(config), "teacher": {"a": 1}}),
    ):
        checkpoint.save(path, {"config": to_dict(config), "teacher": teacher.state_dict()})
        resigned(path, change)
        if "other" not in json.loads((path / "manifest.json").read_text())["facts"]:
            with pytest.raises(CheckpointError, match="another .teacher. configuration; " + remedy):
                labelled_images.read_teacher(path, config, DIGITS)


def npy(descr="<f8", shape=(3,), content=None, header=None, version=b"\x01\x00"):
    """An .npy whose every part may lie."""
    header = header or f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}"
    encoded = header.encode() + b"\n"
    start = b"\x93NUMPY" + version + struct.pack("<H", len(encoded)) + encoded
    return start + (bytes(24) if content is None else content)


def npz(compression=zipfile.ZIP_STORED, **entries):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in {"mu": npy(), "sigma": npy(shape=(3, 3), content=np.eye(3).tobytes()), **entries}.items():
            if content is not None:
                archive.writestr(f"{name}.npy", content)
    return buffer.getvalue()


ARRAY = call("numpy.core.multiarray", "_reconstruct", b"cnumpy\nndarray\n", b"K\x00\x85", b"C\x01b")


def array(shape, count, memo=b""):
    """A float64 array of numpy in a pickle, of that many bytes."""
    kind = call("numpy", "dtype", text("f8"), b"K\x00", b"K\x01") + b"(K\x03" + text("<") + b"NNNJ\xff\xff\xff\xff" * 1
    kind += b"J\xff\xff\xff\xffK\x00tb"
    return ARRAY + b"(K\x01" + shape + kind + b"\x89B" + struct.pack("<I", count) + bytes(count) + b"tb" + memo


def many_entries():
    mu, sigma = array(b"K\x64\x85", 800, b"q\x01"), array(b"K\x64K\x64\x86", 80_000, b"q\x02")
    first = text("a") + b"}(" + text("mu") + mu + text("sigma") + sigma + b"u"
    more = b"".join(text(str(i)) + b"}(" + text("mu") + b"h\x01" + text("sigma") + b"h\x02u" for i in range(5000))
    return whole(b"}(" + first + more + b"u")


LIES = array(b"\x8a\x06" + b"\xff" * 5 + b"\x00\x85", 24)  # 2^40 - 1 numbers in 24 bytes
TEXT = npy("<U4", (), "many".encode("utf-32-le"))


def headed(text):
    return npy(header="{'descr': " + text)


REFERENCES = {
    **{f"n-{i}": npz(n=n) for i, n in enumerate((
        npy("<i8", (2**42,), bytes(8)), TEXT, npy("<i8", (), struct.pack("<q", -1)), npy("<i8", (1,) * 500, bytes(8)),
    ))},
    **{f"mu-{i}": npz(mu=mu) for i, mu in enumerate((
        headed("'<f8', 'fortran_order': False, 'shape': " + "(" * 9000), npy(header="-" * 60_000 + "1"),
        headed("__import__('os').system('x'), 'shape': (3,), }"), npy()[:20], b"", npy(shape=(2**42 // 10,)),
        npy(shape=(10**11, 10**11)), headed("'<f8', 'fortran_order': False, 'shape': (-3,), }"),
        headed("[('a', '<f8')], 'fortran_order': False, 'shape': (3,), }"), npy(version=b"\x02\x00"),
        npy("|O", (1,), pickle.dumps(np.array([Runs()], object))),
    ))},
    "a bomb": npz(zipfile.ZIP_DEFLATED, sigma=npy(shape=(3, 3), content=bytes(2**26))),
    "a bomb of lzma": npz(zipfile.ZIP_LZMA, sigma=npy(shape=(3, 3), content=bytes(2**26))),
    "a shape that is text": npz(shape=TEXT),
    "a shape of two": npz(shape=npy("<i8", (2,), bytes(16))),
    "a detector of 1,000 characters": npz(detector=npy("<U1000", (), bytes(4000))),
    "a pickle that runs": pickle.dumps({"fid": Runs()}),
    "an array that lies": whole(b"}" + text("fid") + b"}(" + text("mu") + LIES + text("sigma") + LIES + b"us"),
    "one array in many entries": many_entries(),
}  # fmt: skip


@pytest.mark.parametrize("name", REFERENCES)
def test_references_that_lie(tmp_path, name):
    path = tmp_path / "r.npz"
    path.write_bytes(npz())
    reference.load(path)
    path.write_bytes(REFERENCES[name])
    with watched(), bounded(40), pytest.raises(BadReference) as error:
        reference.load(path)
    one_line(error, path)


def test_images_in_a_reference_are_not_read(tmp_path):
    path = tmp_path / "r.npz"
    path.write_bytes(npz(zipfile.ZIP_DEFLATED, arr_0=npy("|u1", (2**26,), bytes(2**26))))
    with watched(), bounded(10):
        assert reference.load(path).of_width(3).n is None


def test_bits_that_turn_in_a_reference_are_seen(tmp_path):
    path, draw = tmp_path / "r.npz", random.Random(2)
    content = npz(n=npy("<i8", (), struct.pack("<q", 7)))
    for _ in range(60):
        path.write_bytes(turned(content, draw))
        try:
            found = reference.load(path).of_width(3)
            assert not found.mean.any() and torch.equal(found.covariance, torch.eye(3).double())
            assert found.n in (7, None)
        except BadReference as error:
            assert "\n" not in str(error)


COLLIDING = b"".join(b"\x8a\x0b" + (k * (2**61 - 1)).to_bytes(11, "little") + b"N" for k in range(2**15))
ENCODED = text("x" * 2**20) + b"q\x00c_codecs\nencode\nq\x01" + (b"h\x01h\x00" + text("latin1") + b"\x86R") * 2000
BOMBS = {
    "many tensors": (saved(storage(b""), 0, (0,), (1,), names=[str(i) for i in range(21_000)]), "more than 20,000 ten"),
    "sets": (as_ema(b"\x8f" * 1_000_001), "opcodes"),
    "a memo of millions": (whole(b"N" + b"\x94" * 1_000_001), "opcodes"),
    "marks": (whole(b"(" * 1_000_001), "opcodes"),
    "keys that collide": (whole(b"}(" + COLLIDING + b"u"), "int as a key"),
    "keys of 31 bits": (whole(b"}J" + struct.pack("<i", 2**30) + b"Ns"), "int as a key"),
    "floats as keys": (whole(b"}G" + struct.pack(">d", 1.5) + b"Ns"), "float as a key"),
    "sizes of 100 KB": (saved(storage(bytes(32)), 0, (2**800_000,) * 20, (1,) * 20), "bits: refused"),
    "one text encoded many times": (as_ema(ENCODED), "more bytes than it has"),
    "nested without end": (as_arguments(b"]" + b"\x85" * 300_000), "without end"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_pickles_that_exhaust(tmp_path, name):
    path = tmp_path / "file.pkl"
    path.write_bytes(edm_files.file_of("edm2", 4))
    edm_pickle.read_network(path)
    content, says = BOMBS[name]
    path.write_bytes(content)
    with watched(), bounded(400, seconds=60), pytest.raises(PickleError) as error:
        edm_pickle.read_network(path)
    assert says in one_line(error, path)
