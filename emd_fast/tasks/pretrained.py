"""The task "pretrained": the teacher is a diffusers folder, an EDM checkpoint or a user's function."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from emd_fast import distributed
from emd_fast.config import ConfigError, RunConfig
from emd_fast.diffusion.denoiser import Condition, Denoiser
from emd_fast.diffusion.sampler import heun
from emd_fast.io import code
from emd_fast.io.pickles import PickleError
from emd_fast.io.reading import reason
from emd_fast.metrics import evaluation
from emd_fast.metrics.evaluation import Evaluator
from emd_fast.metrics.images import to_uint8
from emd_fast.reporting import pictures, video
from emd_fast.reporting.progress import say
from emd_fast.tasks import OnStep, encoded
from emd_fast.teachers import custom, edm
from emd_fast.teachers import diffusers as folders
from emd_fast.train import conditions
from emd_fast.train.rungs import by_calls
from emd_fast.train.times import with_shift
from emd_fast.train.trainer import EMDTrainer

_PREVIEWS = 16  # samples in a picture


class Pretrained:
    def __init__(self, config: RunConfig) -> None:
        if not config.pretrained.teacher:
            raise ConfigError("there is no teacher: give --teacher, a folder, a file or package.module:function")
        self.config = config
        self.prompts: conditions.Table | None = None
        self._is_judged = False  # whether the run ends with an evaluation
        self._encoded_in: Path | None = None  # folder of the run whose prompts were encoded

    @property
    def device(self) -> torch.device:
        return distributed.default_device()

    def make_teacher(self, folder: Path, on_step: OnStep | None) -> Denoiser:
        teacher = self._load(distributed.default_device())
        self._check_classes(teacher)
        if self._is_judged:
            self._check_what_is_read_later(teacher)
        self.prompts = self._prompts(teacher, folder, on_step)
        if self.prompts is None and isinstance(teacher, folders.DiffusersDenoiser):
            _check_pass(teacher)
        self._check_guidance(teacher)
        return teacher

    def untrained_teacher(self) -> Denoiser:
        # Of a folder of diffusers only the configuration is read.
        return self._load(torch.device("cpu"), torch.device("meta"))

    def _load(self, device: torch.device, of_folders: torch.device | None = None) -> Denoiser:
        settings = self.config.pretrained
        name, config = settings.teacher, settings.teacher_config
        if config and (":" in name or not Path(name).suffix):
            raise ConfigError(
                f"teacher_config is for a teacher in a single file, and {name} is none: leave --teacher-config out"
            )
        size = {key: getattr(settings, key) for key in ("sample_shape", "height", "width", "frames", "sizes")}
        guidance = {key: getattr(settings, key) for key in ("embedded_guidance", "guidance_2")}
        for key, value in {**size, **guidance}.items():
            if value is not None and (":" in name or self._is_edm):
                option = key.replace("_", "-")
                raise ConfigError(f"{key} is for diffusers folders, and {name} has its own: leave --{option} out")
        if ":" in name and not Path(name).exists():
            code.require(name, "gets its teacher from the Python code", "--teacher")
            return custom.load(name).to(device)
        if Path(name).suffix == ".py":
            raise ConfigError(f"{name} is Python code: give --teacher {Path(name).stem}:FUNCTION, a function in it")
        if self._is_edm:
            try:
                return edm.load(name, device=device)
            except (PickleError, OSError) as error:
                raise ConfigError(str(error)) from None
        where = of_folders or device
        dtype = getattr(torch, settings.prompt_dtype)
        teacher = folders.load(name, config=config or None, device=where, prompt_dtype=dtype, **guidance, **size)
        teacher.check_t_star(self.config.emd.first_time)
        with_shift(self.config.emd, teacher)  # for its errors, before prompts are encoded
        if self._has_texts() and teacher.takes.tensors:
            teacher.folder.check_text()
        return teacher

    @property
    def _is_edm(self) -> bool:
        name = self.config.pretrained.teacher
        is_file = Path(name).is_file() or Path(name).suffix in (".pkl", ".safetensors")
        return is_file and not self.config.pretrained.teacher_config

    def _check_classes(self, teacher: Denoiser) -> None:
        given = self.config.emd.num_classes
        # EDM's null label is the number of classes.
        has = teacher.null_cond or 0 if self._is_edm else given
        has = getattr(teacher, "num_classes", has)
        if has != given:
            raise ConfigError(f"num_classes must be {has} for this teacher, got {given}: give --num-classes {has}")

    def _check_what_is_read_later(self, teacher: Denoiser) -> None:
        """Opens what evaluation and export read. If there will be metrics, one sample must fit their files."""
        if isinstance(teacher, folders.DiffusersDenoiser):
            teacher.folder.check(teacher.channels)
        if not self.evaluator or teacher.sample_shape is None:
            return
        latent = torch.zeros(1, *teacher.sample_shape, device=distributed.default_device())
        shape = tuple(decoded(teacher, latent).shape[1:])
        if len(shape) != 3 or shape[0] not in (1, 3):
            raise ConfigError(f"metrics need images of 1 or 3 channels, and samples are {shape}: leave --detector out")
        try:
            self.evaluator.check_images(shape, self.config.samples)
        except ValueError as error:
            raise ConfigError(str(error)) from None

    def _check_guidance(self, teacher: Denoiser) -> None:
        if self.config.emd.guidance is None:
            return
        if self.prompts is None and not self.config.emd.num_classes:
            raise ConfigError("guidance needs conditions, and this teacher has none: leave --guidance out")
        if teacher.null_cond is None:
            prompts = self.config.pretrained.prompts
            helps = (
                f"{prompts} has none: write it with emd_fast.train.conditions.save(..., null_cond=...)"
                if prompts
                else "this teacher has none: give --teacher package.module:function, a function that sets null_cond"
            )
            raise ConfigError(f"guidance needs a null condition, and {helps}")

    def _prompts(self, teacher: Denoiser, folder: Path, on_step: OnStep | None) -> conditions.Table | None:
        name = self.config.pretrained.prompts
        text = isinstance(teacher, folders.DiffusersDenoiser) and bool(teacher.takes.tensors)
        if not name:
            if text:
                raise ConfigError("this teacher takes prompts: give --prompts FILE, text or .safetensors")
            return None
        negative = self.config.pretrained.negative_prompt
        if name.endswith(".safetensors"):
            if negative:
                raise ConfigError(f"negative_prompt is for prompts as text, and {name} has its own null condition")
            try:
                table = conditions.Mapped(name)
                encoded.check_table(Path(name), folder)
            except ValueError as error:
                raise ConfigError(str(error)) from None
        elif not text:
            raise ConfigError(f"this teacher takes no prompts, got --prompts {name}")
        else:
            table = conditions.Mapped(encoded.encoded(teacher, Path(name), folder, on_step, negative), finite=True)
            self._encoded_in = folder
        _check_taken(teacher, table[table.extremes()], f"the conditions in {name}")
        if teacher.null_cond is None and table.null_cond is not None:
            _check_taken(teacher, table.null_cond, f"the null condition in {name}")
            teacher.null_cond = table.null_cond
        return table

    def make_networks(self) -> tuple[nn.Module | None, Denoiser | None]:
        return None, None

    @functools.cached_property
    def evaluator(self) -> Evaluator:
        files = self.config.evaluation
        named = code.is_allowed(files.detector)
        return Evaluator.read(
            files.detector, files.reference, files.compare_with, files.clip, distributed.default_device(), named=named
        )

    def open_references(self) -> None:
        self._is_judged = True
        self.evaluator.check()
        if self.evaluator.compare_with is not None:
            say(self.evaluator.compare_with.summary)
            distributed.on_main(self.evaluator.compare_with.check)
        if self.evaluator.clip is not None and not self._has_texts():
            raise ConfigError("the CLIP score needs prompts as text: give --prompts FILE, a prompt in each line")

    def basis(self) -> dict[str, Any]:
        return {"samples": self.config.samples, **self.evaluator.hashes()}

    def interim_metrics(self, trainer: EMDTrainer) -> dict[str, float]:
        images, batch = _images(trainer)
        return {"frechet": evaluation.frechet(self.evaluator, images, self.config.samples, batch)}

    def _has_texts(self) -> bool:
        prompts = self.config.pretrained.prompts
        return bool(prompts) and not prompts.endswith(".safetensors")

    def _texts(self) -> Callable[[int, int], list[str]] | None:
        """Returns (first, n) -> prompts by global sample index, in the order of `EMDTrainer.shown`."""
        if self.evaluator.clip is None:
            return None
        path = Path(self.config.pretrained.prompts)
        lines = encoded.lines_of(path)
        if self._encoded_in is not None:
            encoded.check_texts(self._encoded_in, lines, path)
        if self.prompts is not None and len(lines) != len(self.prompts):
            raise ValueError(f"{path} has {len(lines)} prompts, the run was made with {len(self.prompts)}")
        return lambda first, n: [lines[i % len(lines)] for i in range(first, first + n)]

    def evaluate(self, trainer: EMDTrainer, untrained: EMDTrainer, folder: Path) -> dict[str, Any]:
        """Writes pictures, and returns mean, std and the metrics whose files are configured."""
        z, cond = trainer.batches.shown(_PREVIEWS)
        samples = {
            "teacher": heun(trainer.teacher, z, cond, guidance=trainer.config.guidance),
            "init": untrained.generate(_PREVIEWS, cond, ema=False),
            **by_calls(trainer, _PREVIEWS, cond),
        }

        def draw() -> None:
            for name, x in samples.items():
                images = decoded(trainer.teacher, x)
                if images.dim() in (4, 5) and images.shape[1] in (1, 3) and images.isfinite().all():
                    pictures.save_grid(folder / "samples" / f"{name}.png", images)
                    if images.dim() == 5:
                        pictures.save_video(folder / "samples" / f"{name}{video.ending()}", images)

        distributed.on_main(draw)
        moments = {
            "mean": {name: x.mean().item() for name, x in samples.items()},
            "std": {name: x.std().item() for name, x in samples.items()},
        }
        if not self.evaluator:
            return {"n": _PREVIEWS, **moments}
        by_index, batch = _images(trainer)
        found = evaluation.evaluate(self.evaluator, by_index, self.config.samples, batch, self._texts())
        metrics = {name: {"generator": value} for name, value in found.items()}
        provenance = evaluation.provenance(self.evaluator, self.config.samples, trainer.config.seed)
        return {**metrics, **provenance, "previews": _PREVIEWS, **moments}


@torch.no_grad()
def _check_taken(teacher: Denoiser, cond: Condition, what: str) -> None:
    """Whether a teacher takes conditions (n, ...), by one pass.

    Raises:
        ConfigError: it does not.
    """
    if teacher.sample_shape is None:  # the trainer refuses such a teacher
        return
    device = next((parameter.device for parameter in teacher.parameters()), distributed.default_device())
    cond = pytree.tree_map(lambda leaf: leaf.to(device), cond)
    n = len(pytree.tree_leaves(cond)[0])
    try:
        for shape, sized in _by_size(teacher, cond):
            output = teacher(torch.zeros(n, *shape, device=device), _times(teacher, n).to(device), sized)
            conditions.check_finite(output, "it returns NaN or infinite values for them")
    except torch.OutOfMemoryError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"this teacher does not take {what}: {reason(error)}; write them with emd_fast.train.conditions.save"
        ) from error


@torch.no_grad()
def _check_pass(teacher: folders.DiffusersDenoiser) -> None:
    """Tries one pass. A configuration may build a network that cannot compute.

    Raises:
        ConfigError: the pass fails, or returns values that are not finite.
    """
    device = next(teacher.parameters()).device
    cond = torch.zeros(1, dtype=torch.int64, device=device) if teacher.num_classes else None
    try:
        for shape, _ in _by_size(teacher, cond):
            output = teacher(torch.zeros(1, *shape, device=device), _times(teacher, 1).to(device), cond)
            if not output.isfinite().all():
                raise ValueError("it returns values that are not finite")
    except torch.OutOfMemoryError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"the network in {teacher.folder.model} fails in its first pass: {reason(error)}; correct its config.json"
        ) from error


def _by_size(teacher: Denoiser, cond: Condition) -> Iterator[tuple[tuple[int, ...], Condition]]:
    """Shape and condition of each size of a run."""
    for shape in teacher.sample_shapes:
        yield shape, teacher.sized(cond, shape) if teacher.other_shapes else cond


def _times(teacher: Denoiser, n: int) -> Tensor:
    schedule = teacher.schedule
    return torch.full((n,), (schedule.t_min + schedule.t_max) / 2, dtype=torch.float32)


def _images(trainer: EMDTrainer) -> tuple[evaluation.Images, int]:
    """Returns the generator's images by global index, and the batch size of the training."""
    config = trainer.config

    def images(first: int, n: int) -> Tensor:
        return to_uint8(decoded(trainer.teacher, trainer.generate(n, first_sample=first)))

    return images, config.compute.micro_batch_size or -(-config.batch_size // distributed.world_size())


def decoded(teacher: Denoiser, samples: Tensor) -> Tensor:
    """Decodes latents to images if the teacher has a VAE; returns other samples unchanged."""
    return teacher.decode(samples) if isinstance(teacher, folders.DiffusersDenoiser) else samples
