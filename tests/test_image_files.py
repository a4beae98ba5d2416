"""Folders and archives of images as people have them: which files count, and what is said of the others."""

import io
import os
import shutil
import struct
import zipfile
import zlib

import detector_files as files
import numpy as np
import pytest
import torch
from PIL import Image
from watch import PROCESSES, watched

from emd_fast.metrics.images import ImageFiles


def test_links_are_followed_and_hidden_files_and_dead_links_are_counted(tmp_path):
    images = files.pictures(4)
    root = tmp_path / "set"
    files.folder(root / "a", images[:2])
    files.folder(tmp_path / "elsewhere", images[2:])
    (root / "b").symlink_to(tmp_path / "elsewhere")
    (root / "b" / "again").symlink_to(root)  # a circle
    (root / "dead.png").symlink_to("nowhere.png")
    files.folder(root / ".ipynb_checkpoints", images[:1])
    (root / ".DS_Store").touch()
    (root / "labels.json").touch()
    os.mkfifo(root / "pipe.png")
    found = ImageFiles(root)
    assert torch.equal(found(0, 4), images)
    left = "1 dead links, 1 folders reached twice, 2 hidden, 2 of another kind"
    assert found.summary == f"4 images in {root}, left out: {left}"


def test_an_archive_has_the_same_rule(tmp_path):
    folder = files.folder(tmp_path / "images", files.pictures(2))
    archive = files.zipped(tmp_path / "images.zip", folder)
    with zipfile.ZipFile(archive, "a") as file:
        for name in ("__MACOSX/._x.png", ".hidden/x.png", "readme.txt"):
            file.writestr(name, b"no image")
    assert ImageFiles(archive).summary == f"2 images in {archive}, left out: 2 hidden, 2 of another kind"


@pytest.mark.parametrize("grey", [0, 1])
def test_grey_images_among_rgb_are_repeated(tmp_path, grey):
    images = files.pictures(2)
    files.folder(tmp_path, images)
    name = sorted(tmp_path.rglob("*.png"))[grey]
    Image.fromarray(images[grey, 0].numpy()).save(name)
    found = ImageFiles(tmp_path)
    assert found.shape == (3, 8, 8) and torch.equal(found(grey, 1)[0], images[grey, :1].expand(3, 8, 8))
    assert torch.equal(found(0, 2)[1 - grey], images[1 - grey])


def png_of_size(width: int, height: int) -> bytes:
    chunks = {b"IHDR": struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT": zlib.compress(b"")}
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks.items()
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def damaged(name: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(files.pictures(1)[0].permute(1, 2, 0).numpy()).save(buffer, name)
    return buffer.getvalue()[: len(buffer.getvalue()) // 2]


UNREADABLE = {
    **{f"x.{kind}": damaged(kind.replace("jpg", "jpeg")) for kind in ("png", "jpg", "webp", "avif")},
    "x.gif": b"GIF89a",
    "x.tiff": b"II*\0\xff\xff\xff\xff",
    "empty.png": b"",
}
LARGE = [
    ("x.png", png_of_size(65535, 65535), "pixels"),
    ("x.png", png_of_size(9000, 9000), "claims 9000 x 9000 pixels"),
]
CASES = [*LARGE, *((name, contents, "cannot read the image") for name, contents in UNREADABLE.items())]


@pytest.mark.parametrize(("name", "contents", "said"), CASES, ids=range(len(CASES)))
def test_a_file_that_is_no_whole_image_is_named_in_one_line(tmp_path, name, contents, said):
    (tmp_path / name).write_bytes(contents)
    with pytest.raises(ValueError, match=said) as error:
        ImageFiles(tmp_path)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_an_archive_of_arrays_is_no_archive_of_images(tmp_path):
    np.savez(tmp_path / "samples.npz", arr_0=np.zeros((2, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match=r"no image in .*samples\.npz: it holds arrays"):
        ImageFiles(tmp_path / "samples.npz")


def test_a_damaged_archive_is_named_in_one_line(tmp_path):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("a.png", b"x")
    damaged = bytearray(content.getvalue())
    damaged[damaged.rfind(b"PK\x01\x02")] = 0
    (tmp_path / "bad.zip").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"bad\.zip is a damaged archive: Bad magic number"):
        ImageFiles(tmp_path / "bad.zip")


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"


@pytest.mark.parametrize("name", ["x.png", "x.eps", "x.jpg"])
@pytest.mark.parametrize("zipped", [False, True])
def test_an_image_that_is_a_program_starts_nothing(tmp_path, name, zipped):
    path = files.folder(tmp_path / "images", files.pictures(1))
    (path / name).write_bytes(POSTSCRIPT)
    if zipped:
        shutil.make_archive(tmp_path / "images", "zip", path)
        path = tmp_path / "images.zip"
    with watched(PROCESSES):
        if name == "x.eps":
            assert ImageFiles(path).summary.endswith("left out: 1 of another kind")
        else:
            images = ImageFiles(path)
            for read in (images.check, lambda: images(0, 2)):
                with pytest.raises(ValueError, match=rf"cannot read the image .*{name}: it is none of PNG, JPEG"):
                    read()


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_archive_with_a_name_twice_is_refused(tmp_path):
    archive = files.zipped(tmp_path / "images.zip", files.folder(tmp_path / "images", files.pictures(2)))
    with zipfile.ZipFile(archive, "a") as file:
        name = file.namelist()[0]
        file.writestr(name, file.read(name))
    with pytest.raises(ValueError, match=rf"images.zip has 2 files of the name {name}: leave one of them there"):
        ImageFiles(archive)
