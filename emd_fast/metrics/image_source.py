"""The files of a folder or a .zip that are taken as images."""

from __future__ import annotations

import collections
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from emd_fast.io import reading

LARGEST = 2**28
"""Bytes of one file. No encoded image of a data set comes near."""


class Source(Protocol):
    """Files by name, relative to a root."""

    names: list[str]
    left_out: collections.Counter[str]

    def read(self, name: str) -> bytes: ...


def open_source(path: Path, endings: set[str]) -> Source:
    """Lists the image files of a folder or a .zip, sorted by name.

    One rule for both: every file with an image's ending, in subfolders too. Links are followed, and
    a folder that is reached twice counts once. Hidden files and folders (their names start with a
    dot, such as .ipynb_checkpoints) and __MACOSX are left out.

    Args:
        endings: of image files, lower case, with the dot.

    Raises:
        ValueError: neither a folder nor a .zip, or no image in it.
    """
    source: Source
    if path.is_dir():
        source = _Folder(path, endings)
    elif zipfile.is_zipfile(path):
        source = _Zip(path, endings)
    else:
        raise ValueError(f"{path} is neither a folder nor a .zip of images")
    if not source.names:
        arrays = path.suffix == ".npz"
        raise ValueError(
            f"there is no image in {path}"
            + (": it holds arrays. Write them as image files into a folder" if arrays else "")
            + (f" ({_counted(source.left_out)} left out)" if source.left_out and not arrays else "")
        )
    return source


def summary(path: Path, source: Source) -> str:
    """One line: how many files are taken, how many are left out, and why."""
    left = f", left out: {_counted(source.left_out)}" if source.left_out else ""
    return f"{len(source.names):,} images in {path}{left}"


def _counted(reasons: collections.Counter[str]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(reasons.items()))


def _reason(name: str, endings: set[str]) -> str | None:
    """Why a file is no image of the set, or None."""
    if any(part.startswith(".") or part == "__MACOSX" for part in Path(name).parts):
        return "hidden"
    return None if os.path.splitext(name)[1].lower() in endings else "of another kind"


class _Folder:
    def __init__(self, root: Path, endings: set[str]) -> None:
        self.root, self.names, self.left_out = root, [], collections.Counter[str]()
        for name in self._files():
            reason = _reason(name, endings)
            if reason is None and not (root / name).is_file():
                reason = "dead links" if (root / name).is_symlink() else "of another kind"
            if reason is None:
                self.names.append(name)
            else:
                self.left_out[reason] += 1
        self.names.sort()

    def _files(self) -> Iterator[str]:
        seen = {os.path.realpath(self.root)}
        for folder, subfolders, files in os.walk(self.root, followlinks=True):
            for name in list(subfolders):
                real = os.path.realpath(os.path.join(folder, name))
                if real in seen:
                    subfolders.remove(name)
                    self.left_out["folders reached twice"] += 1
                seen.add(real)
            yield from (os.path.relpath(os.path.join(folder, name), self.root) for name in files)

    def read(self, name: str) -> bytes:
        with open(self.root / name, "rb") as file:
            contents = file.read(LARGEST + 1)
        if len(contents) > LARGEST:
            raise ValueError(f"the file has more than {LARGEST >> 20} MiB")
        return contents


class _Zip:
    def __init__(self, path: Path, endings: set[str]) -> None:
        try:
            self._archive = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, NotImplementedError) as error:
            raise ValueError(f"{path} is a damaged archive: {reading.reason(error)}") from None
        self.names, self.left_out = [], collections.Counter[str]()
        for info in self._archive.infolist():
            if info.is_dir():
                continue
            if reason := _reason(info.filename, endings):
                self.left_out[reason] += 1
            else:
                self.names.append(info.filename)
        self.names.sort()
        for name, count in collections.Counter(self.names).items():
            if count > 1:  # only the last could be read
                raise ValueError(f"{path} has {count} files of the name {name}: leave one of them there")

    def read(self, name: str) -> bytes:
        if self._archive.getinfo(name).file_size > LARGEST:
            raise ValueError(f"the file has more than {LARGEST >> 20} MiB")
        return self._archive.read(name)
