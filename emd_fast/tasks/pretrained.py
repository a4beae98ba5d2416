"""A teacher that is there already: a folder of diffusers, a checkpoint of EDM, or a function of the user's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from emd_fast import conditions, report
from emd_fast.config import ConfigError, RunConfig
from emd_fast.denoiser import Denoiser
from emd_fast.progress import say
from emd_fast.sampler import heun
from emd_fast.tasks import OnStep
from emd_fast.teachers import custom, edm
from emd_fast.teachers import diffusers as folders
from emd_fast.trainer import EMDTrainer

_SHOWN = 16


class Pretrained:
    def __init__(self, config: RunConfig) -> None:
        if not config.pretrained.teacher:
            raise ConfigError("there is no teacher: give --teacher, a folder, a file or package.module:function")
        self.config = config
        self.prompts: conditions.Table | None = None

    def make_teacher(self, folder: Path, on_step: OnStep | None) -> Denoiser:
        teacher = self._load(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        self._check_classes(teacher)
        self.prompts = self._prompts(teacher, folder)
        return teacher

    def untrained_teacher(self) -> Denoiser:
        return self._load(torch.device("cpu"))

    def _load(self, device: torch.device) -> Denoiser:
        name = self.config.pretrained.teacher
        if ":" in name and not Path(name).exists():
            return custom.load(name).to(device)
        if _is_edm(name):
            return edm.load(name, device=device)
        return folders.load(name, device=device)

    def _check_classes(self, teacher: Denoiser) -> None:
        given = self.config.emd.num_classes
        # EDM's label "none" comes behind the others.
        has = teacher.null_cond or 0 if _is_edm(self.config.pretrained.teacher) else given
        has = getattr(teacher, "num_classes", has)
        if has != given:
            raise ConfigError(f"num_classes must be {has} for this teacher, got {given}: give --num-classes {has}")

    def _prompts(self, teacher: Denoiser, folder: Path) -> conditions.Table | None:
        name = self.config.pretrained.prompts
        text = isinstance(teacher, folders.DiffusersDenoiser) and teacher.takes.embedding
        if not name:
            if text:
                raise ConfigError("this teacher takes prompts: give --prompts FILE, text or .safetensors")
            return None
        if name.endswith(".safetensors"):
            table = conditions.Mapped(name)
        elif not text:
            raise ConfigError(f"this teacher takes no prompts, got --prompts {name}")
        else:
            table = conditions.Mapped(self._encoded(teacher, Path(name), folder / "prompts.safetensors"))
        if teacher.null_cond is None:
            teacher.null_cond = table.null_cond
        return table

    def _encoded(self, teacher: Any, prompts: Path, encoded: Path) -> Path:
        """The prompts of a text file, one a line, encoded once for the whole run."""
        if not encoded.exists():
            try:
                lines = [line.strip() for line in prompts.read_text().splitlines() if line.strip()]
            except OSError as error:
                raise ConfigError(f"cannot read the prompts in {prompts}: {error.strerror}") from None
            if not lines:
                raise ConfigError(f"there is no prompt in {prompts}")
            say(f"encoding {len(lines)} prompts")
            conditions.save(encoded, teacher.encode(lines), teacher.encode([""]))
        return encoded

    def make_networks(self) -> tuple[nn.Module | None, Denoiser | None]:
        return None, None

    def evaluate(self, trainer: EMDTrainer, untrained: EMDTrainer, folder: Path | None) -> dict[str, Any]:
        """Pictures, and first moments; there is no real data to compare with."""
        z, cond = trainer.shown(_SHOWN)
        samples = {
            "teacher": heun(trainer.teacher, z, cond, guidance=trainer.config.guidance),
            "init": untrained.generate(_SHOWN, cond, ema=False),
            "student": trainer.generate(_SHOWN, cond),
        }
        if folder is not None:
            for name, x in samples.items():
                images = decoded(trainer.teacher, x)
                if images.dim() == 4 and images.shape[1] in (1, 3) and images.isfinite().all():
                    report.save_grid(folder / "samples" / f"{name}.png", images)
        return {
            "n": _SHOWN,
            "mean": {name: x.mean().item() for name, x in samples.items()},
            "std": {name: x.std().item() for name, x in samples.items()},
        }


def _is_edm(name: str) -> bool:
    return Path(name).is_file() or Path(name).suffix in (".pkl", ".safetensors")


def decoded(teacher: Denoiser, samples: Tensor) -> Tensor:
    """Images of the teacher's latents, where it has a VAE."""
    return teacher.decode(samples) if isinstance(teacher, folders.DiffusersDenoiser) else samples
