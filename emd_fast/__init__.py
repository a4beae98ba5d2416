"""emd_fast: fused kernels and a trainer for EM Distillation (arXiv 2405.16852)."""

from emd_fast import distributed, ops, schedules, teachers
from emd_fast.backends import backend_report, use_backend
from emd_fast.config import EMDConfig
from emd_fast.diffusion.denoiser import Denoiser
from emd_fast.diffusion.few_step import FewStepGenerator
from emd_fast.diffusion.generator import Generator
from emd_fast.diffusion.rung import OnRung
from emd_fast.em.e_step import EStep, e_step
from emd_fast.fusion import fuse, fusion_report, unfuse
from emd_fast.noise import Noise
from emd_fast.train.trainer import EMDTrainer

__version__ = "0.2.0"

__all__ = [
    "Denoiser",
    "EMDConfig",
    "EMDTrainer",
    "EStep",
    "FewStepGenerator",
    "Generator",
    "Noise",
    "OnRung",
    "backend_report",
    "distributed",
    "e_step",
    "fuse",
    "fusion_report",
    "ops",
    "schedules",
    "teachers",
    "unfuse",
    "use_backend",
]
