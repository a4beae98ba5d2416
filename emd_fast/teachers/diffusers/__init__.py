"""Teachers from diffusers folders: a pipeline, or a model with its scheduler (docs/teachers.md).

diffusers is imported when a folder is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emd_fast.config import ConfigError
from emd_fast.diffusion.denoiser import Condition, Denoiser
from emd_fast.io.reading import shown
from emd_fast.teachers.diffusers.architectures import ConditionSpec, Network
from emd_fast.teachers.diffusers.encoder import TextEncoder
from emd_fast.teachers.diffusers.folder import Folder, import_diffusers
from emd_fast.teachers.diffusers.scheduler import SchedulerInfo, read

__all__ = ["DiffusersDenoiser", "load"]


class DiffusersDenoiser(Denoiser):
    """Denoiser with a network from a diffusers folder.

    Attributes:
        folder: the folder.
        trained: schedule, parametrization and times, from the scheduler's configuration.
        takes: the conditions that the network takes.
        channels: channels of a sample.
        num_classes: number of labels that may be drawn; 0 without labels.
    """

    network: Network

    def __init__(
        self,
        network: Network,
        folder: Folder,
        training: SchedulerInfo,
        scheduler_config: Mapping[str, Any],
        sample_shape: Sequence[int],
        null_cond: Condition,
    ) -> None:
        channels = sample_shape[0]
        super().__init__(
            network,
            training.schedule,
            training.parametrization,
            c_noise=training.index,
            output=lambda returned: returned[:, :channels],  # without a learned variance
            sample_shape=sample_shape,
            null_cond=null_cond,
        )
        self.channels = channels
        self.folder, self.trained, self.scheduler_config = folder, training, dict(scheduler_config)

    @property
    def takes(self) -> ConditionSpec:
        return self.network.takes

    @property
    def num_classes(self) -> int:
        # The null label of a DiT must not be drawn.
        null = self.folder.architecture.null_label(self.network.model.config)  # type: ignore[arg-type]
        return self.takes.num_classes if null is None else null

    def time(self, index: float) -> float:
        """Returns the t of a training index i: i / (N - 1) for N betas, i / N for a rectified flow."""
        return index / self.trained.index_scale

    def check_t_star(self, t_star: float) -> None:
        """Checks that t_star is a time of the schedule, not an index of the training.

        Raises:
            ConfigError: another time; the message has the time of an index.
        """
        if 0 <= t_star <= 1:
            return
        last = self.trained.index_scale
        index = int(t_star) if 10 <= t_star <= last else int(0.6 * last)
        raise ConfigError(
            f"t_star must be a time in [0, 1] for this teacher, got {t_star:g}: index {index} is "
            f"teacher.time({index}), give --t-star {self.time(index)!r} for it"
        )

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Encodes prompts to a condition (B, ...) with the text encoders of the folder.

        The encoders are read for this call and then freed.

        Raises:
            ConfigError: the teacher takes no text, or its folder has no text encoder.
        """
        if isinstance(prompts, str):
            raise TypeError("prompts must be a list of strings, got one string")
        return self.text_encoder()(prompts)

    def text_encoder(self) -> TextEncoder:
        """Reads the text encoders of the folder, for several calls.

        Raises:
            ConfigError: the teacher takes no text, or its folder has no text encoder.
        """
        if not self.takes.embedding:
            raise ConfigError(f"this {self.folder.model_class} takes {self.takes}, not prompts")
        return self.folder.text_encoder(self.network.model)

    def decode(self, latents: Tensor) -> Tensor:
        """Decodes latents to images (B, 3, H, W) float32 with the folder's VAE.

        Without a VAE it returns the latents as float32.
        """
        return self.folder.decode(latents)


def load(
    folder: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    scheduler: str | Path | Mapping[str, Any] | Any = None,
    sample_shape: Sequence[int] | None = None,
    null_cond: Condition = None,
) -> DiffusersDenoiser:
    """Loads a teacher from a diffusers folder, in eval mode.

    The supported networks are UNet2DModel, UNet2DConditionModel, DiTTransformer2DModel and
    SD3Transformer2DModel.

    Args:
        folder: folder of a pipeline or a model, or the name of a pipeline on the hub.
        device, dtype: device and dtype of the weights. Generator and fake score start as copies,
            so float32 is recommended.
        scheduler: replaces the folder's scheduler: a scheduler, its configuration, or a folder
            with scheduler_config.json.
        sample_shape: (C, H, W). None takes in_channels and sample_size of the configuration.
        null_cond: the unconditional condition for guidance. A DiT has its own. For text it is
            usually `teacher.encode([""])`, which can be assigned to `teacher.null_cond` later.

    Raises:
        ModuleNotFoundError: diffusers is not installed.
        FileNotFoundError: there is no such folder.
        ConfigError: the folder has no model, or its architecture or scheduler is not supported.
    """
    import_diffusers()
    source = Folder(folder)
    config = _scheduler_config(scheduler) if scheduler is not None else source.scheduler_config()
    training = read(config)
    network = Network(source.load_model(dtype))
    shape = tuple(sample_shape) if sample_shape is not None else _sample_shape(network.model.config)
    _check_channels(source.model_class, network.model.config, shape)
    if null_cond is None:
        null_cond = source.architecture.null_label(network.model.config)  # type: ignore[arg-type]
    teacher = DiffusersDenoiser(network, source, training, config, shape, null_cond)
    teacher.source = str(source.root.resolve())
    return teacher.to(device).eval().requires_grad_(False)


def _scheduler_config(scheduler: Any) -> dict[str, Any]:
    if isinstance(scheduler, (str, Path)):
        from emd_fast.teachers.diffusers.folder import read_json

        return read_json(Path(scheduler) / "scheduler_config.json")
    if isinstance(scheduler, Mapping):
        return dict(scheduler)
    config = getattr(scheduler, "config", None)
    if config is None:
        raise TypeError(f"scheduler must be a scheduler, its configuration or a folder, got {type(scheduler).__name__}")
    return {**config, "_class_name": type(scheduler).__name__}


def _sample_shape(config: Any) -> tuple[int, ...]:
    size = config.get("sample_size")
    if size is None:
        raise ConfigError(
            "the model's config.json has no sample_size: give --sample-shape C,H,W, or load(sample_shape=(C, H, W))"
        )
    sides = (size, size) if isinstance(size, int) else size
    if not isinstance(sides, (list, tuple)) or not all(type(side) is int and 0 < side <= 2**14 for side in sides):
        raise ConfigError(f"the model's configuration has sample_size = {shown(size)}, not (H, W)")
    return (config["in_channels"], *sides)


def _check_channels(name: str, config: Any, shape: Sequence[int]) -> None:
    channels, returned = config["in_channels"], config.get("out_channels") or config["in_channels"]
    if len(shape) != 3 or shape[0] != channels:
        raise ConfigError(f"sample_shape must be ({channels}, H, W) for this {name}, got {tuple(shape)}")
    if returned not in (channels, 2 * channels):
        raise ConfigError(
            f"this {name} has in_channels {channels} and out_channels {returned}: only as many, or twice as many (a "
            "learned variance) are supported"
        )
