"""Weight files of a component, by the names that diffusers and transformers give them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from emd_fast.config import ConfigError

DIFFUSERS = ("diffusion_pytorch_model", "diffusion_pytorch_model")  # stems of .safetensors and .bin
TRANSFORMERS = ("model", "pytorch_model")
_SUFFIXES = (".safetensors", ".bin")
_PREFERRED = ("fp16", "bf16")  # of several variants


class Weights(NamedTuple):
    """Weights of one component.

    Attributes:
        file: the file, or the index of its shards.
        variant: as "fp16" in `diffusion_pytorch_model.fp16.safetensors`; None for the plain name.
        safetensors: False for `.bin`.
    """

    file: Path
    variant: str | None
    safetensors: bool

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of `from_pretrained` that read these files."""
        return {"variant": self.variant, "use_safetensors": self.safetensors}

    @property
    def plain_name(self) -> str:
        """Name of the file without the variant."""
        return self.file.name.replace(f".{self.variant}.", ".") if self.variant else self.file.name


def find(folder: Path, stems: tuple[str, str] = DIFFUSERS) -> Weights:
    """The weights in a component's folder, whole or in shards.

    Files without a variant are preferred, then fp16, then bf16; safetensors are preferred to `.bin`.

    Raises:
        ConfigError: there are none, or several variants without a preferred one. The message has what
            is there.
    """
    found = []
    for path in sorted(folder.iterdir()):
        for stem, suffix in zip(stems, _SUFFIXES, strict=True):
            if match := _named(stem, suffix).fullmatch(path.name):
                found.append(Weights(path, match["a"] or match["b"], suffix == ".safetensors"))
    # An index is preferred to a whole file, as in diffusers.
    found.sort(key=lambda one: (not one.safetensors, one.file.suffix != ".json"))
    variants = list(dict.fromkeys(one.variant for one in found))
    for variant in (None, *_PREFERRED, *(variants if len(variants) == 1 else ())):
        for one in found:
            if one.variant == variant:
                return one
    if found:
        names = ", ".join(one.file.name for one in found)
        raise ConfigError(f"{folder} has weights of several variants, {names[:300]}: leave one of them there")
    shards = [path.name for path in sorted(folder.iterdir()) if re.search(r"-\d{5}-of-\d{5}\.", path.name)]
    there = ", ".join(path.name for path in sorted(folder.iterdir()))[:300] or "no files"
    why = "shards without their .index.json" if shards else "no weights of a known name"
    raise ConfigError(
        f"{folder} has {why} ({there}): {stems[0]}.safetensors or {stems[1]}.bin are read, whole or in shards, with or "
        "without a variant as .fp16"
    )


def _named(stem: str, suffix: str) -> re.Pattern[str]:
    variant = r"[A-Za-z][A-Za-z0-9_]*"
    stem, suffix = re.escape(stem), re.escape(suffix)
    return re.compile(rf"{stem}(?:\.(?P<a>{variant}))?{suffix}|{stem}{suffix}\.index(?:\.(?P<b>{variant}))?\.json")


def drop_variant(folder: Path, stems: tuple[str, str] = DIFFUSERS) -> None:
    """Renames the weights in a folder to the plain name, which pipelines read without a `variant`."""
    weights = find(folder, stems)
    weights.file.rename(weights.file.with_name(weights.plain_name))
