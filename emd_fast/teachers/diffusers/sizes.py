"""Sizes of samples in pixels and frames, and the shapes of their latents."""

from __future__ import annotations

from collections.abc import Sequence

from emd_fast.config import ConfigError
from emd_fast.io.reading import shown
from emd_fast.teachers.diffusers.architectures import Architecture
from emd_fast.teachers.diffusers.architectures.form import Config

Shape = tuple[int, ...]


def shapes_of(
    architecture: Architecture,
    vae: Config,
    *,
    sample_shape: Sequence[int] | None,
    height: int | None,
    width: int | None,
    frames: int | None,
    sizes: Sequence[Sequence[int]] | None,
) -> tuple[Shape, ...]:
    """Shapes of the samples of a run, the first of which is that of pictures and exports.

    Args:
        vae: configuration of the VAE; empty without one.
        sample_shape: (C, H, W) or (C, F, H, W) in latents.
        height, width, frames: pixels and frames of the one size; None for those of the configuration.
        sizes: several sizes, [height, width] or [height, width, frames] each. A video of two
            numbers has `frames` frames.

    Raises:
        ConfigError: a size that VAE or patches do not divide, sizes that are equal, or a size that is
            given twice.
    """
    if sample_shape is not None and (height, width, frames, sizes) != (None,) * 4:
        raise ConfigError("sample_shape and height, width, frames, sizes give the size twice: leave one of them out")
    if sizes is not None:
        if (height, width) != (None, None):
            raise ConfigError("sizes and height, width give the size twice: leave one of them out")
        return _several(architecture, vae, sizes, frames)
    if sample_shape is None:
        sample_shape = architecture.sample_shape(vae, height, width, frames)
    architecture.check_shape(sample_shape)
    return (tuple(sample_shape),)


def _several(
    architecture: Architecture, vae: Config, sizes: Sequence[Sequence[int]], frames: int | None
) -> tuple[Shape, ...]:
    form = "[height, width] or [height, width, frames]" if architecture.video else "[height, width]"
    if not sizes:
        raise ConfigError("sizes has no size: give at least one, or leave sizes out")
    lengths = (2, 3) if architecture.video else (2,)
    for size in sizes:
        if len(size) not in lengths or not all(type(side) is int for side in size):
            raise ConfigError(f"each of sizes must be {form} for this {type(architecture).__name__}, got {shown(size)}")
    if frames is not None and all(len(size) == 3 for size in sizes):
        raise ConfigError("sizes have their own frames: leave frames out")
    found: dict[Shape, Sequence[int]] = {}
    for size in sizes:
        own = size[2] if len(size) == 3 else frames
        shape = architecture.sample_shape(vae, size[0], size[1], own)
        architecture.check_shape(shape)
        if shape in found:
            raise ConfigError(f"sizes must differ, got {list(found[shape])} and {list(size)}: leave one of them out")
        found[shape] = size
    return tuple(found)


def resized(
    architecture: Architecture,
    vae: Config,
    shape: Sequence[int],
    *,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
) -> Shape:
    """The shape of a sample of another size.

    Args:
        vae: configuration of the VAE; empty without one.
        shape: of a sample whose size counts where height, width or frames are None.

    Raises:
        ConfigError: a size that VAE or patches do not divide.
    """
    usual_frames, *usual = architecture.pixels(shape, vae)
    if frames is None and architecture.video:
        frames = usual_frames
    height, width = (own if given is None else given for given, own in zip((height, width), usual, strict=True))
    return architecture.sample_shape(vae, height, width, frames)
