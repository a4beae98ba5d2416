"""Videos as files: MP4 by PyAV, GIF without it."""

import sys

import numpy as np
import pytest
import torch

from emd_fast.metrics.images import ImageFiles
from emd_fast.reporting import pictures, video


@pytest.fixture
def without_av(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)


def clips(n=2, frames=5, height=48, width=64, channels=3):
    """Smooth clips in [-1, 1] (n, channels, F, H, W), of which each frame differs from the others."""
    axes = [torch.linspace(0, 3, size) for size in (channels, frames, height, width)]
    c, f, y, x = torch.meshgrid(*axes, indexing="ij")
    return torch.stack([torch.sin(c + f + y + phase) * torch.cos(x - f) for phase in range(n)])


def as_bytes(images):
    return (images * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def decoded(path):
    """Frames (F, H, W, 3) uint8 of a file."""
    if path.suffix == ".mp4":
        import av

        with av.open(path) as container:
            (stream,) = container.streams
            assert (stream.codec_context.name, stream.pix_fmt, float(stream.average_rate)) == ("h264", "yuv420p", 16)
            return torch.from_numpy(np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]))
    from PIL import Image, ImageSequence

    frames = ImageSequence.Iterator(Image.open(path))
    return torch.from_numpy(np.stack([np.array(frame.convert("RGB")) for frame in frames]))


@pytest.mark.parametrize(("height", "width", "channels"), [(48, 64, 3), (47, 63, 3), (48, 64, 1)])
def test_an_mp4_decodes_to_its_frames(tmp_path, height, width, channels):
    pytest.importorskip("av")
    made = clips(height=height, width=width, channels=channels)
    pictures.save_each(tmp_path / "each", lambda first, n: made[first : first + n], 2, first=7)
    assert sorted(path.name for path in (tmp_path / "each").iterdir()) == ["000007.mp4", "000008.mp4"]
    for path, clip in zip(sorted((tmp_path / "each").iterdir()), made, strict=True):
        wanted = as_bytes(clip).permute(1, 2, 3, 0).expand(-1, -1, -1, 3).float()
        frames = decoded(path).float()
        assert frames.shape == (5, height + height % 2, width + width % 2, 3)
        frames = frames[:, :height, :width]
        # Colours are stored for 2x2 pixels, and rounded twice.
        assert (frames - wanted).abs().mean() < 4 and (frames - wanted).abs().max() < 64
        assert (frames[0] - wanted[1]).abs().mean() > 8  # another frame is farther away


def test_a_gif_appears_without_pyav(tmp_path, without_av):
    assert video.ending() == ".gif"
    made = clips()
    pictures.save_each(tmp_path / "each", lambda first, n: made[first : first + n], 2)
    assert sorted(path.name for path in (tmp_path / "each").iterdir()) == ["000000.gif", "000001.gif"]
    frames = decoded(tmp_path / "each" / "000000.gif").float()
    assert (frames - as_bytes(made[0]).permute(1, 2, 3, 0).float()).abs().mean() < 4  # 256 colours
    with pytest.raises(ModuleNotFoundError, match=r"emd_fast\[video\]"):
        pictures.save_video(tmp_path / "clip.mp4", made)
    assert not list(tmp_path.glob("*clip*"))


@pytest.mark.parametrize("ending", video.ENDINGS)
def test_videos_side_by_side(tmp_path, ending):
    if ending == ".mp4":
        pytest.importorskip("av")
    made = clips()
    pictures.save_video(tmp_path / f"clip{ending}", made)
    frames = decoded(tmp_path / f"clip{ending}")
    wanted = np.stack([np.array(pictures.grid(made[:, :, i])) for i in range(5)])
    assert frames.shape == wanted.shape
    assert (frames.float() - torch.from_numpy(wanted).float()).abs().mean() < 6


def test_an_error_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    pictures.save_video(tmp_path / "clip.gif", clips())
    before = (tmp_path / "clip.gif").read_bytes()

    def broken(file, pixels):
        file.write(b"GIF89a")
        raise OSError("disk full")

    monkeypatch.setattr(video, "_gif", broken)
    with pytest.raises(OSError, match="disk full"):
        pictures.save_video(tmp_path / "clip.gif", 0.5 * clips())
    assert (tmp_path / "clip.gif").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("wrong", [clips()[0], clips()[:0], clips().repeat(1, 2, 1, 1, 1), clips() * torch.nan])
def test_what_is_no_video_is_refused(tmp_path, wrong):
    with pytest.raises(ValueError):
        pictures.save_video(tmp_path / "clip.gif", wrong)
    assert not list(tmp_path.iterdir())


def test_readers_of_images_leave_videos_out(tmp_path):
    pytest.importorskip("av")
    made = clips()
    pictures.save_each(tmp_path, lambda first, n: made[first : first + n], 2)
    with pytest.raises(ValueError, match="there is no image in"):
        ImageFiles(tmp_path)
    pictures.save_each(tmp_path, lambda first, n: made[first : first + n, :, 0], 2)
    images = ImageFiles(tmp_path)
    assert len(images) == 2 and images.summary.endswith("left out: 2 of another kind")
