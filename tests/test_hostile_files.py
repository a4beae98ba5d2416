"""Checkpoints, teachers, references and pickles of an attacker run nothing, exhaust nothing, and end in one line."""

from __future__ import annotations

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
from hostile_pickles import as_ema, as_state, call, saved, storage, text, whole
from torch import nn
from watch import bounded, watched

from emd_fast import Denoiser, EMDConfig, EMDTrainer, schedules
from emd_fast.config import TeacherConfig, to_dict
from emd_fast.io.pickles import PickleError
from emd_fast.metrics import reference
from emd_fast.metrics.reference import BadReference
from emd_fast.run.best import best_of_run
from emd_fast.tasks import digits as digits_task
from emd_fast.tasks import digits_teacher
from emd_fast.teachers import edm_pickle
from emd_fast.teachers.mlp import TimeMLP
from emd_fast.train import checkpoint, checkpoint_format
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


def one_line(error, path):
    said = str(error.value)
    assert str(path) in said and "\n" not in said and len(said) < 700 + 2 * len(str(path)), said
    return said


class Runs:
    """Pickles as a call of os.system."""

    def __reduce__(self):
        return os.system, ("touch /tmp/emd_fast_ran",)


# Checkpoints ----------------------------------------------------------------------------------------------------------

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


def resigned(path, change):
    """The manifest changed by somebody who signs it again."""
    table = json.loads((path / "manifest.json").read_bytes())
    del table["sha256"]
    change(table)
    (path / "manifest.json").write_bytes(checkpoint_format.signed(table))


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


def at(*keys, value):
    """Sets one field of a manifest."""

    def change(table):
        for key in keys[:-1]:
            table = table[key]
        table[keys[-1]] = value

    return change


def renamed(name, other):
    return lambda table: table["tensors"].update({other: table["tensors"].pop(name)})


W = ("tensors", "generator.w")
BOMB = {"dtype": "uint8", "shape": [2**50], "chunks": [[0, 0, 2**50]]}
MANIFESTS = {
    "a field more": (at("loader", value="os.system"), "fields"),
    "a field less": (lambda table: table.pop("files"), "fields"),
    "a version that is text": (at("version", value="3"), "fields"),
    "a version that is true": (at("version", value=True), "fields"),
    "facts that are a list": (at("facts", value=[]), "facts"),
    "tensors that are a list": (at("tensors", value=[]), "files or tensors"),
    "files by name": (at("files", value={"../../etc/passwd": [1, "0" * 64]}), "files or tensors"),
    "a file with a name": (at("files", 0, value=["../x", 10, "0" * 64]), "size and SHA-256"),
    "a file of negative size": (at("files", 0, 0, value=-1), "size and SHA-256"),
    "a file of 2^70 bytes": (at("files", 0, 0, value=2**70), "size and SHA-256"),
    "a size that is true": (at("files", 0, 0, value=True), "size and SHA-256"),
    "a digest that is no digest": (at("files", 0, 1, value="../x"), "size and SHA-256"),
    "an entry that is bytes": (at(*W, value={"bytes": "gASV"}), "the entry 'generator.w'"),
    "an entry of another class": (at(*W, "class", value="BytesStorageMetadata"), "the entry 'generator.w'"),
    "an entry that is a list": (at(*W, value=[]), "the entry 'generator.w'"),
    "a dtype that is a function": (at(*W, "dtype", value="load"), "the dtype"),
    "a dtype with a module": (at(*W, "dtype", value="torch.float32"), "the dtype"),
    "a dtype that is dunder": (at(*W, "dtype", value="__class__"), "the dtype"),
    "a dtype that is a list": (at(*W, "dtype", value=["float32"]), "the dtype"),
    "a wider dtype": (at(*W, "dtype", value="float64"), "gaps|size"),
    "a shape that is text": (at(*W, "shape", value="34"), "the shape"),
    "a shape of text": (at(*W, "shape", value=["3", "4"]), "the shape"),
    "a shape of booleans": (at(*W, "shape", value=[True, 12]), "the shape"),
    "a shape of floats": (at(*W, "shape", value=[3.0, 4.0]), "the shape"),
    "a negative shape": (at(*W, "shape", value=[-3, -4]), "the shape"),
    "a shape of 500 sizes": (at(*W, "shape", value=[1] * 500), "the shape"),
    "a shape of 500 long sizes": (at(*W, "shape", value=[10**4000] * 500), "the shape"),
    "a shape of 2^120 elements": (at(*W, "shape", value=[2**59, 2**59]), "the shape"),
    "an empty shape of long strides": (at(*W, value={**BOMB, "shape": [0, 2**59, 2**59], "chunks": []}), "the shape"),
    "more elements than the file has": (at(*W, value=BOMB), "gaps|size"),
    "more elements, and the file says so": (
        lambda table: (at(*W, value=BOMB)(table), at("files", 0, value=[2**50 + 16, "0" * 64])(table)),
        "gaps|size",
    ),
    "another number of rows": (at(*W, "shape", value=[4, 3]), "the rows"),
    "no chunks": (at(*W, "chunks", value=[]), "the rows"),
    "a chunk of no rows": (at(*W, "chunks", 0, value=[0, 0, 0]), "chunks"),
    "a chunk of negative rows": (at(*W, "chunks", value=[[0, 0, 4], [0, 0, -1]]), "chunks"),
    "a chunk before the file": (at(*W, "chunks", 0, 1, value=-8), "chunks"),
    "a chunk behind the file": (at(*W, "chunks", 0, 1, value=2**40), "gaps"),
    "a chunk over another": (at("tensors", "ema.w", "chunks", 0, 1, value=0), "gaps"),
    "two tensors of one chunk": (
        at("tensors", "ema.x", value={"dtype": "float32", "shape": [2], "chunks": [[0, 56, 2]]}),
        "gaps",
    ),
    "a chunk in no file": (at(*W, "chunks", 0, 0, value=1), "chunks"),
    "a chunk in a file of text": (at(*W, "chunks", 0, 0, value="../x"), "chunks"),
    "a name without a part": (renamed("ema.w", "w"), "the name"),
    "a part that is a fact": (renamed("ema.w", "step.w"), "the name"),
}  # fmt: skip


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_that_lies_is_refused_before_anything_is_read(copy, name):
    change, says = MANIFESTS[name]
    resigned(copy, change)
    said = refused(copy)
    assert any(word in said for word in says.split("|")), said


def test_what_a_trainer_does_not_expect_is_refused(copy):
    resigned(copy, renamed("ema.w", "ema.v"))
    with pytest.raises(CheckpointError, match="does not fit this ema: it holds no w"):
        checkpoint.restore(copy, {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()})


def written(path, content):
    path.write_bytes(content)


def linked(path, target):
    path.unlink()
    path.symlink_to(target)


def fifo(path):
    path.unlink()
    os.mkfifo(path)


CONTENTS = {
    "brackets": lambda x: written(x / "manifest.json", b"[" * 10**6),
    "nested facts": lambda x: written(
        x / "manifest.json", b'{"format": "emd_fast checkpoint", "facts": ' + b"[" * 10**5 + b"]" * 10**5 + b"}"
    ),
    "a number of a million digits": lambda x: written(x / "manifest.json", b'{"version": 1' + b"0" * 10**6 + b"}"),
    "not UTF-8": lambda x: written(x / "manifest.json", b'{"\xff": 1}'),
    "a pickle as the manifest": lambda x: written(x / "manifest.json", pickle.dumps(Runs())),
    "a manifest that is a fifo": lambda x: fifo(x / "manifest.json"),
    "a manifest that never ends": lambda x: linked(x / "manifest.json", "/dev/zero"),
    "a manifest of 1 TiB": lambda x: os.truncate(x / "manifest.json", 2**40),
    "a key twice": lambda x: written(
        x / "manifest.json", (x / "manifest.json").read_bytes().replace(b'"version": 3', b'"version": 3, "version": 3')
    ),
    "a file of the manifest that is missing": lambda x: resigned(x, lambda table: table["files"].append([0, "0" * 64])),
    "a pickle as the tensors": lambda x: written(x / "rank-00000.bin", pickle.dumps(Runs())),
    "a file of torch as the tensors": lambda x: torch.save(Runs(), x / "rank-00000.bin"),
    "tensors that are a fifo": lambda x: fifo(x / "rank-00000.bin"),
    "tensors that never end": lambda x: linked(x / "rank-00000.bin", "/dev/zero"),
    "tensors that are a folder": lambda x: ((x / "rank-00000.bin").unlink(), (x / "rank-00000.bin").mkdir()),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_files_that_are_something_else(copy, name):
    CONTENTS[name](copy)
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
            damaged, position = bytearray(content), draw.randrange(len(content))
            damaged[position] ^= 1 << draw.randrange(8)
            (copy / name).write_bytes(damaged)
            for read in (checkpoint.load, checkpoint.facts):
                with pytest.raises(CheckpointError) as error:
                    read(copy)
                one_line(error, copy)
        (copy / name).write_bytes(content)
    assert checkpoint.load(copy)["step"] == 3


# The facts of a trainer -----------------------------------------------------------------------------------------------


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


FACTS = {
    "no facts": at("facts", value={}),
    "a configuration that is text": at("facts", "config", value="os.system"),
    "an unknown key": at("facts", "config", "__class__", value="x"),
    "steps that are text": at("facts", "config", "steps", value="4"),
    "steps that are a table": at("facts", "config", "steps", value={"a": 1}),
    "a step that is text": at("facts", "step", value="4"),
    "a negative step": at("facts", "step", value=-1),
    "a step of 2^80": at("facts", "step", value=2**80),
    "skipped that is no number": at("facts", "skipped", value=float("nan")),
    "a teacher that is text": at("facts", "teacher", value="x"),
    "a teacher without a hash": at("facts", "teacher", value={"path": None}),
    "counters that are a list": at("facts", "groups", value=[]),
    "counters that set the rate": at("facts", "groups", "generator", value=[{"lr": 1e9}]),
    "counters of no group": at("facts", "groups", "generator", value=[]),
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
    path = shutil.copytree(good, checkpoint.best_of(tmp_path / "checkpoints"))
    resigned(path, at("facts", "notes", value=notes))
    assert best_of_run(tmp_path) is None


# The teacher of digits ------------------------------------------------------------------------------------------------


def test_a_teacher_that_was_damaged_is_named_and_not_used(tmp_path):
    config = TeacherConfig()
    teacher = digits_teacher.denoiser(digits_teacher.network(config))
    path, draw = tmp_path / "teacher", random.Random(1)
    checkpoint.save(path, {"config": to_dict(config), "teacher": teacher.state_dict()})
    read = digits_task._read_teacher(path, config).state_dict()
    assert all(torch.equal(read[name], value) for name, value in teacher.state_dict().items())
    remedy = "remove it to train the teacher again"
    for name in ("manifest.json", "rank-00000.bin"):
        content = (path / name).read_bytes()
        for _ in range(20):
            damaged = bytearray(content)
            damaged[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            (path / name).write_bytes(damaged)
            with pytest.raises(CheckpointError, match=remedy + "|has format version") as error:
                digits_task._read_teacher(path, config)
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
                digits_task._read_teacher(path, config)


# References -----------------------------------------------------------------------------------------------------------


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


def zipped_pickle():
    buffer = io.BytesIO()
    np.save(buffer, np.array([Runs()], object), allow_pickle=True)
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
REFERENCES = {
    "n that lies": npz(n=npy("<i8", (2**42,), bytes(8))),
    "n that is text": npz(n=npy("<U4", (), "many".encode("utf-32-le"))),
    "n that is negative": npz(n=npy("<i8", (), struct.pack("<q", -1))),
    "n of 500 dimensions": npz(n=npy("<i8", (1,) * 500, bytes(8))),
    "a shape of nested brackets": npz(mu=npy(header="{'descr': '<f8', 'fortran_order': False, 'shape': " + "(" * 9000)),
    "a header of many minuses": npz(mu=npy(header="-" * 60_000 + "1")),
    "a header that calls": npz(mu=npy(header="{'descr': __import__('os').system('x'), 'shape': (3,), }")),
    "a header that is cut off": npz(mu=npy()[:20]),
    "an empty member": npz(mu=b""),
    "a size of 2^42": npz(mu=npy(shape=(2**42 // 10,))),
    "sizes that multiply to it": npz(mu=npy(shape=(10**11, 10**11))),
    "a negative size": npz(mu=npy(header="{'descr': '<f8', 'fortran_order': False, 'shape': (-3,), }")),
    "objects": npz(mu=zipped_pickle()),
    "a type of fields": npz(mu=npy(header="{'descr': [('a', '<f8')], 'fortran_order': False, 'shape': (3,), }")),
    "a later format": npz(mu=npy(version=b"\x02\x00")),
    "a bomb": npz(zipfile.ZIP_DEFLATED, sigma=npy(shape=(3, 3), content=bytes(2**26))),
    "a bomb of lzma": npz(zipfile.ZIP_LZMA, sigma=npy(shape=(3, 3), content=bytes(2**26))),
    "a shape that is text": npz(shape=npy("<U4", (), "many".encode("utf-32-le"))),
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
    """Those of the arrays by the checksums of the archive."""
    path, draw = tmp_path / "r.npz", random.Random(2)
    content = npz(n=npy("<i8", (), struct.pack("<q", 7)))
    for _ in range(60):
        damaged = bytearray(content)
        damaged[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            found = reference.load(path).of_width(3)
            assert not found.mean.any() and torch.equal(found.covariance, torch.eye(3).double())
            assert found.n in (7, None)
        except BadReference as error:
            assert "\n" not in str(error)


# Pickles that exhaust -------------------------------------------------------------------------------------------------

COLLIDING = b"".join(b"\x8a\x0b" + (k * (2**61 - 1)).to_bytes(11, "little") + b"N" for k in range(2**15))
ENCODED = text("x" * 2**20) + b"q\x00c_codecs\nencode\nq\x01" + (b"h\x01h\x00" + text("latin1") + b"\x86R") * 2000
BOMBS = {
    "sets": (as_ema(b"\x8f" * 1_000_001), "opcodes"),
    "a memo of millions": (whole(b"N" + b"\x94" * 1_000_001), "opcodes"),
    "marks": (whole(b"(" * 1_000_001), "opcodes"),
    "keys that collide": (whole(b"}(" + COLLIDING + b"u"), "int as a key"),
    "keys of 31 bits": (whole(b"}J" + struct.pack("<i", 2**30) + b"Ns"), "int as a key"),
    "floats as keys": (whole(b"}G" + struct.pack(">d", 1.5) + b"Ns"), "float as a key"),
    "sizes of 100 KB": (saved(storage(bytes(32)), 0, (2**800_000,) * 20, (1,) * 20), "bits: refused"),
    "one text encoded many times": (as_ema(ENCODED), "more bytes than it has"),
    "nested without end": (
        as_state(b"}(" + text("_init_args") + b")" + text("_init_kwargs") + b"]" + b"\x85" * 300_000 + b"u"),
        "without end",
    ),
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


def test_many_tensors_of_nothing(tmp_path):
    path = tmp_path / "file.pkl"
    path.write_bytes(saved(storage(b""), 0, (0,), (1,), names=[str(i) for i in range(21_000)]))
    with watched(), pytest.raises(PickleError, match="more than 20,000 tensors"):
        edm_pickle.read_network(path)
