"""Teachers from diffusers folders and single files (docs/teachers.md).

diffusers is imported when a folder is loaded.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emd_fast.config import ConfigError
from emd_fast.diffusion import ragged
from emd_fast.diffusion.denoiser import Condition, Denoiser
from emd_fast.teachers.diffusers.architectures import ConditionSpec, Experts, Network
from emd_fast.teachers.diffusers.architectures.conditions import GUIDANCE
from emd_fast.teachers.diffusers.encoder import TextEncoder
from emd_fast.teachers.diffusers.folder import Folder, import_diffusers
from emd_fast.teachers.diffusers.scheduler import SchedulerInfo, read
from emd_fast.teachers.diffusers.shift import shift_of
from emd_fast.teachers.diffusers.single_file import SingleFile
from emd_fast.teachers.diffusers.sizes import resized, shapes_of

__all__ = ["DiffusersDenoiser", "load"]


class DiffusersDenoiser(Denoiser):
    """Denoiser with a network from a diffusers folder.

    Attributes:
        folder: the folder.
        trained: schedule, parametrization and times, from the scheduler's configuration.
        takes: the conditions that the network takes.
        channels: channels of a sample.
        embedded_guidance: guidance that `encode` adds to the conditions; None for the default of the pipeline.
        guidance_2: guidance weight of the second of two networks, where the first is guided; None for the same.
        prompt_dtype: dtype of the embeddings that `encode` returns.
        num_classes: number of labels that may be drawn; 0 without labels.
    """

    network: Network
    prompt_dtype = torch.float32

    def __init__(
        self,
        network: Network,
        folder: Folder,
        training: SchedulerInfo,
        scheduler_config: Mapping[str, Any],
        shapes: Sequence[tuple[int, ...]],
        null_cond: Condition,
        embedded_guidance: float | None,
        guidance_2: float | None = None,
    ) -> None:
        channels = shapes[0][0]
        super().__init__(
            network,
            training.schedule,
            training.parametrization,
            c_noise=training.index,
            output=lambda returned: returned[:, :channels],  # without a learned variance
            sample_shape=shapes[0],
            other_shapes=shapes[1:],
            null_cond=null_cond,
            rescale=network.architecture.rescale,
        )
        self.channels, self.embedded_guidance, self.guidance_2 = channels, embedded_guidance, guidance_2
        self.folder, self.trained, self.scheduler_config = folder, training, dict(scheduler_config)
        self._vae_config = folder.vae_config()

    @property
    def takes(self) -> ConditionSpec:
        return self.network.takes

    @property
    def num_classes(self) -> int:
        # The null label of a DiT must not be drawn.
        null = self.network.architecture.null_label
        return self.takes.num_classes if null is None else null

    @property
    def shift(self) -> float | None:
        assert self.sample_shape is not None
        return self.shift_of(self.sample_shape)

    def shift_of(self, shape: Sequence[int]) -> float | None:
        return shift_of(self.scheduler_config, functools.partial(self.network.architecture.mu, shape))

    def blank_condition(self) -> Condition:
        return self.takes.blank(self.network.architecture.text_tokens())

    def at(self, times: Sequence[float]) -> DiffusersDenoiser:
        network = self.network
        if not isinstance(network, Experts):
            return self
        below = network.below(self.trained.index(torch.tensor(times, dtype=torch.float32, device="cpu"))).tolist()
        if any(below) != all(below):
            return self
        facts = self.folder, self.trained, self.scheduler_config, self.sample_shapes
        one = DiffusersDenoiser(network.alone(all(below)), *facts, self.null_cond, self.embedded_guidance)
        one.source, one.weights_dtype, one.prompt_dtype = self.source, self.weights_dtype, self.prompt_dtype
        return one.train(self.training)

    def guidance_at(self, t: Tensor, guidance: float | Tensor | None) -> float | Tensor | None:
        if guidance is None or self.guidance_2 is None or not isinstance(self.network, Experts):
            return guidance
        below = self.network.below(self.trained.index(t))
        return torch.where(below, self.guidance_2, guidance).to(t.dtype)

    def sized(self, cond: Condition, shape: Sequence[int]) -> Condition:
        return self.network.sized(cond, shape, self._vae_config)

    def resized(
        self, height: int | None = None, width: int | None = None, frames: int | None = None
    ) -> tuple[int, ...]:
        """The shape of a sample of a size in pixels; None keeps a side of `sample_shape`.

        Raises:
            ConfigError: a size that VAE or patches do not divide.
        """
        assert self.sample_shape is not None
        architecture = self.network.architecture
        return resized(architecture, self._vae_config, self.sample_shape, height=height, width=width, frames=frames)

    def heard(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        return self.network.architecture.heard(t, dtype)

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

        The encoders are read for this call and then freed. Padding that no prompt needs is cut where
        the network takes a mask.

        Raises:
            ConfigError: the teacher takes no text, or its folder has no text encoder.
        """
        if isinstance(prompts, str):
            raise TypeError("prompts must be a list of strings, got one string")
        return ragged.trimmed(self.text_encoder()(prompts))

    def text_encoder(self) -> TextEncoder:
        """Reads the text encoders of the folder, for several calls.

        Raises:
            ConfigError: the teacher takes no text, or its folder has no text encoder.
        """
        if not self.takes.tensors:
            raise ConfigError(f"this {self.folder.model_class} takes {self.takes}, not prompts")
        assert self.sample_shape is not None
        encoder = self.folder.text_encoder(self.network.model, self.sample_shape, self.embedded_guidance)
        encoder.dtype = self.prompt_dtype
        return encoder

    def decode(self, latents: Tensor) -> Tensor:
        """Decodes latents to images (B, 3, H, W) or videos (B, 3, F, H, W) float32 with the folder's VAE.

        Without a VAE it returns the latents as float32.
        """
        return self.folder.decode(latents)


def load(
    folder: str | Path,
    *,
    config: str | Path | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    scheduler: str | Path | Mapping[str, Any] | Any = None,
    sample_shape: Sequence[int] | None = None,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    sizes: Sequence[Sequence[int]] | None = None,
    embedded_guidance: float | None = None,
    guidance_2: float | None = None,
    prompt_dtype: torch.dtype = torch.float32,
    null_cond: Condition = None,
) -> DiffusersDenoiser:
    """Loads a teacher from a diffusers folder, in eval mode.

    docs/teachers.md lists the supported networks.

    Args:
        folder: folder of a pipeline or a model, the name of a pipeline on the hub, or with `config`
            a .safetensors file with the weights.
        config: folder of a pipeline or a model that describes the weights in a file. It needs no
            weights of its own, except those of components that the file does not have.
        device, dtype: device and dtype of the weights. Generator and fake score start as copies,
            so float32 is recommended. On "meta" no weights are read: config.json is enough.
        scheduler: replaces the folder's scheduler: a scheduler, its configuration, or a folder
            with scheduler_config.json.
        sample_shape: (C, H, W), or (C, F, H, W) of a video, in latents. None takes it from height,
            width and frames.
        height, width, frames: size in pixels. None takes the size of the configuration, or the
            default of the pipeline.
        sizes: several sizes in pixels, [height, width] or [height, width, frames] each, in place of
            height and width. A run draws one of them for each step. The first is that of pictures
            and exports. A video of two numbers has `frames` frames.
        embedded_guidance: guidance that the network takes as an input, which `encode` adds to the
            conditions. None takes the default of the pipeline.
        guidance_2: guidance weight of the second of two networks, wherever the teacher is guided. None
            takes that of the first.
        prompt_dtype: dtype of the embeddings that `encode` returns. The encoders compute in float32.
        null_cond: the unconditional condition for guidance. A DiT has its own. For text it is
            usually `teacher.encode([""])`, which can be assigned to `teacher.null_cond` later.

    Raises:
        ModuleNotFoundError: diffusers is not installed.
        FileNotFoundError: there is no such folder.
        ConfigError: the folder has no model, or its architecture or scheduler is not supported.
    """
    import_diffusers()
    source = _source(Path(folder), config) if config is not None else Folder(folder)
    on_meta = torch.device(device).type == "meta"
    if scheduler is None and on_meta and not source.has_scheduler:
        scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler"}  # sizes do not depend on it
    chain = _scheduler_config(scheduler) if scheduler is not None else source.scheduler_config()
    training = read(chain)
    network = source.load_network(dtype, steps=training.index_scale, on_meta=on_meta)
    architecture = network.architecture
    architecture.check_channels()
    vae = source.vae_config()
    size = {"height": height, "width": width, "frames": frames}
    shapes = shapes_of(architecture, vae, sample_shape=sample_shape, sizes=sizes, **size)
    if embedded_guidance is not None and GUIDANCE not in network.takes.tensors:
        raise ConfigError(f"this {source.model_class} has no embedded guidance: leave embedded_guidance out")
    if guidance_2 is not None and not isinstance(network, Experts):
        raise ConfigError(f"this {source.model_class} is one network: leave guidance_2 out")
    if null_cond is None:
        null_cond = architecture.null_label
    teacher = DiffusersDenoiser(network, source, training, chain, shapes, null_cond, embedded_guidance, guidance_2)
    teacher.source, teacher.prompt_dtype = str(source.root.resolve()), prompt_dtype
    if source.file is not None:
        teacher.source = f"{source.file.path.resolve()} of SHA-256 {source.file.sha256}, described by {teacher.source}"
    return teacher.to(device).eval().requires_grad_(False)


def _source(file: Path, config: str | Path) -> Folder:
    if file.is_dir():
        raise ConfigError(f"{file} is a folder, which has its own configuration: leave --teacher-config out")
    if not Path(config).is_dir():
        raise ConfigError(
            f"{config} is no folder: --teacher-config is a folder of diffusers that describes the weights in {file}"
        )
    return Folder(config, SingleFile(file))


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
