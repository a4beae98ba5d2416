"""Videos as files: MP4 (H.264) by PyAV where it is installed, else GIF by Pillow."""

from __future__ import annotations

from typing import Any, BinaryIO

import numpy as np
from torch import Tensor

ENDINGS = (".mp4", ".gif")
REMEDY = 'MP4 files need PyAV with libx264: `pip install "emd_fast[video]"`, or give a name that ends in .gif'
RATE = 16  # frames per second
_CODEC = "libx264"


def ending() -> str:
    """Ending of the files of videos here: ".mp4" if PyAV can encode them, else ".gif"."""
    return ".gif" if _pyav() is None else ".mp4"


def encode(file: BinaryIO, frames: Tensor, kind: str) -> None:
    """Writes a video to an open file.

    Args:
        file: open for writing, can seek.
        frames: (F, 1 or 3, H, W) uint8, F at least 1. Odd sides of an MP4 get their last row or column
            twice, because its colours are stored for 2x2 pixels.
        kind: ".mp4" or ".gif".

    Raises:
        ModuleNotFoundError: ".mp4" without PyAV.
    """
    pixels = frames.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().cpu().numpy()
    (_mp4 if kind == ".mp4" else _gif)(file, pixels)


def _gif(file: BinaryIO, pixels: Any) -> None:
    from PIL import Image

    first, *others = [Image.fromarray(frame) for frame in pixels]
    first.save(file, format="GIF", save_all=True, append_images=others, duration=1000 // RATE, loop=0)


def _mp4(file: BinaryIO, pixels: Any) -> None:
    av = _pyav()
    if av is None:
        raise ModuleNotFoundError(REMEDY, name="av")
    height, width = pixels.shape[1:3]
    pixels = np.pad(pixels, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    with av.open(file, "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = container.add_stream(_CODEC, rate=RATE, options={"crf": "18"})
        stream.height, stream.width = pixels.shape[1:3]
        stream.pix_fmt = "yuv420p"  # the one that browsers play
        for frame in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def _pyav() -> Any:
    """The module av, or None where it is missing or cannot encode H.264."""
    try:
        import av
    except ImportError:
        return None
    return av if _CODEC in av.codecs_available else None
