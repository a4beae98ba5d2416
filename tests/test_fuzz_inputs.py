"""Fuzz of the readers: valid files with something changed are read, or refused in one line, in bounded memory."""

from __future__ import annotations

import copy
import io
import json
import math
import resource
import shutil
from datetime import timedelta

import detector_files
import diffusers_folders
import pytest
import tomli_w
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from emd_fast import config
from emd_fast.cli.errors import REPORTED
from emd_fast.metrics.images import ImageFiles
from emd_fast.tasks import encoded
from emd_fast.teachers.diffusers.folder import Folder
from emd_fast.train import conditions

pytestmark = pytest.mark.filterwarnings("ignore")

MOST = 256  # MiB that the examples of a test may add to the memory of the process


def deep(depth, kind):
    value = 1
    for _ in range(depth):
        value = [value] if kind is list else {"a": value}
    return value


WRONG = [None, True, 0, -1, 1, 2, 3, 1.5, 2**31, 2**63, 10**30, 1e300, float("nan"), float("inf"), -float("inf")]
WRONG += [
    "",
    "x",
    "a\nb",
    "\0",
    "../x",
    "/",
    "\u2028",
    "é" * 3000,
    "DDPMScheduler",
    "AutoencoderKL",
    "UNet2DModel",
    "StableDiffusionPipeline",
]
WRONG += [[], [[]], {}, {"a": 1}, ["diffusers"], [1, 2], [0.5, 2.0], [[0.1, 0.2]], ["a", None], [None, None]]
WRONG += ["\ud800", deep(60, list), deep(60, dict), list(range(3000)), {str(i): i for i in range(300)}]


def places(value, path=()):
    """Paths of all values of a tree of dicts and lists."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


@st.composite
def trees(draw, tree, wrong=tuple(WRONG)):
    """A tree of dicts and lists with one to three values left out, replaced, repeated, moved or added."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        if not (paths := places(tree)):
            break
        *above, key = draw(st.sampled_from(paths))
        parent = tree
        for step in above:
            parent = parent[step]
        value = copy.deepcopy(draw(st.sampled_from(wrong)))
        match draw(st.sampled_from(["remove", "replace", "replace", "scale", "nest", "add", "move", "swap"])):
            case "remove":
                del parent[key]
            case "scale" if type(parent[key]) in (int, float):
                parent[key] *= draw(st.sampled_from([-1, 0, 2, 10**3, 10**9]))
            case "nest":
                parent[key] = [parent[key]]
            case "add" if isinstance(parent, dict):
                parent[draw(st.sampled_from(["", "x", "_x", "a\nb", "text_encoder", "vqvae", "auto_map"]))] = value
            case "move" if isinstance(parent, dict):
                parent["x" * draw(st.sampled_from([1, 5000]))] = parent.pop(key)
            case "swap" if isinstance(parent, dict):
                parent[key] = copy.deepcopy(parent[draw(st.sampled_from(list(parent)))])
            case _:
                parent[key] = value
    return tree


PIECES = [
    b"",
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\r",
    b"\n",
    b"\xed\xa0\x80",
    b"\xe2\x80\xa8",
    b"[" * 3000,
    b'"',
    b"9" * 5000,
]


@st.composite
def edits(draw, content):
    """Bytes with one to four pieces cut, put in, overwritten or repeated, or all of it in another encoding."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        first = draw(st.integers(0, len(content)))
        last = min(len(content), first + draw(st.sampled_from([0, 1, 4, 40, 10**6])))
        piece = draw(st.one_of(st.sampled_from(PIECES), st.binary(max_size=8)))
        match draw(st.sampled_from(["replace", "replace", "repeat", "turn"])):
            case "repeat":
                content[first:first] = content[first:last] * 2
            case "turn" if first < len(content):
                content[first] ^= 1 << draw(st.integers(0, 7))
            case _:
                content[first:last] = piece
    return bytes(content)


def texts(tree):
    return st.one_of(trees(tree).map(json.dumps).map(str.encode), edits(json.dumps(tree).encode()))


def encodings(text):
    return st.sampled_from(["utf-16", "utf-16-le", "utf-32", "utf-8-sig", "latin-1"]).map(
        lambda name: text.encode(name)
    )


# Files, valid -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A DiT pipeline; None without diffusers."""
    pytest.importorskip("diffusers")
    return diffusers_folders.dit(tmp_path_factory.mktemp("fuzz") / "teacher")


PROMPTS = "a cat\n\nüber\r\n😀\n".encode()
TABLE = {"a": torch.randn(4, 3), "b": torch.arange(4), "null.a": torch.zeros(1, 3), "null.b": torch.arange(1)}
RECIPE = config.to_dict(config.load("sd15"))
TOML = [value for value in WRONG if "None" not in repr(value)]


@st.composite
def tables(draw):
    """A safetensors file with a changed header or changed bytes."""
    content = save(TABLE)
    if draw(st.booleans()):
        return draw(edits(content))
    size = int.from_bytes(content[:8], "little")
    header = json.dumps(draw(trees(json.loads(content[8 : 8 + size])))).encode()
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


def recipes():
    written = trees(RECIPE, tuple(TOML)).map(lambda tree: tomli_w.dumps(tree).encode("utf-8", "surrogatepass"))
    text = tomli_w.dumps(RECIPE)
    return st.one_of(written, edits(text.encode()), encodings(text))


@st.composite
def pictures(draw):
    """(ending, content) of an image with changed bytes."""
    ending, kind = draw(
        st.sampled_from(
            [
                ("png", "png"),
                ("jpg", "jpeg"),
                ("gif", "gif"),
                ("webp", "webp"),
                ("tiff", "tiff"),
                ("bmp", "bmp"),
                ("ppm", "ppm"),
            ]
        )
    )
    buffer = io.BytesIO()
    Image.fromarray(detector_files.pictures(1)[0].permute(1, 2, 0).numpy()).save(buffer, kind)
    return ending, draw(edits(buffer.getvalue()))


# Readers ----------------------------------------------------------------------------------------------------------


def read_index(folder, content):
    (folder / "model_index.json").write_bytes(content)
    found = Folder(folder)
    assert found.has("vae") in (True, False) and found.pipeline_class is not False


def read_network(folder, content):
    from emd_fast.teachers import diffusers as teachers

    (folder / "transformer" / "config.json").write_bytes(content)
    teacher = teachers.load(folder)
    if math.prod(teacher.sample_shape) > 2**16:  # a valid size, for which attention would take minutes
        return
    teacher(torch.zeros(1, *teacher.sample_shape), torch.tensor([0.5]), torch.tensor([0]))


def read_scheduler(folder, content):
    from emd_fast.teachers.diffusers.scheduler import read

    (folder / "scheduler" / "scheduler_config.json").write_bytes(content)
    schedule = read(Folder(folder).scheduler_config()).schedule
    assert schedule.alpha(torch.tensor([schedule.t_min, schedule.t_max])).isfinite().all()


def read_prompts(folder, content):
    (folder / "p.txt").write_bytes(content)
    for prompt in encoded.lines_of(folder / "p.txt"):
        assert prompt == prompt.strip() and prompt and not set(prompt) & set("\r\n\0")


def read_table(folder, content):
    (folder / "t.safetensors").write_bytes(content)
    table = conditions.Mapped(folder / "t.safetensors")
    row, null = table[torch.tensor([len(table) - 1, 0])], table.null_cond
    leaves = [row] if isinstance(row, torch.Tensor) else list(row.values())
    assert all(len(leaf) == 2 and leaf.double().isfinite().all() for leaf in leaves)
    assert null is None or isinstance(null, torch.Tensor) or null.keys() == row.keys()


def read_recipe(folder, content):
    (folder / "r.toml").write_bytes(content)
    read = config.load(str(folder / "r.toml"))
    tomli_w.dumps(config.to_dict(read)).encode()


def read_image(folder, content):
    ending, content = content
    shutil.rmtree(folder / "images", ignore_errors=True)
    (folder / "images").mkdir()
    (folder / "images" / f"x.{ending}").write_bytes(content)
    images = ImageFiles(folder / "images")
    assert images(0, 1).shape == (1, *images.shape) and images(0, 1).dtype == torch.uint8


def json_of(name):
    """Changes of a JSON file of the pipeline."""
    return lambda folder: texts(json.loads((folder / name).read_text()))


# name -> (reader, folder -> strategy of contents)
READERS = {
    "model_index.json": (read_index, json_of("model_index.json")),
    "config.json": (read_network, json_of("transformer/config.json")),
    "scheduler_config.json": (read_scheduler, json_of("scheduler/scheduler_config.json")),
    "prompts": (read_prompts, lambda _: st.one_of(edits(PROMPTS), encodings("a cat\nétoile\n"))),
    "table": (read_table, lambda _: tables()),
    "recipe": (read_recipe, lambda _: recipes()),
    "image": (read_image, lambda _: pictures()),
}


def check(name, examples, folder):
    read, contents = READERS[name]
    outcomes = {"read": 0, "refused": 0}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @settings(max_examples=examples, deadline=timedelta(seconds=20))
    @given(contents(folder))
    def one(content):
        try:
            read(folder, content)
            outcomes["read"] += 1
        except REPORTED as error:
            assert not isinstance(error, RecursionError), content
            outcomes["refused"] += 1
            said = str(error)
            assert said and len(said.splitlines()) == 1 and len(said) < 2000, (said, content)

    one()
    print(name, outcomes)
    assert outcomes["read"] and outcomes["refused"], outcomes
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST * 1024  # KiB on Linux


@pytest.fixture
def folder(request, tmp_path):
    if request.node.callspec.params["name"].endswith(".json"):
        return shutil.copytree(request.getfixturevalue("good"), tmp_path / "teacher")
    return tmp_path


@pytest.mark.parametrize("name", READERS)
def test_changed_files_are_read_or_refused_in_one_line(name, folder):
    check(name, 20, folder)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", READERS)
def test_many_changed_files_are_read_or_refused_in_one_line(name, folder):
    check(name, 500, folder)
