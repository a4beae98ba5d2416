"""Sources of teachers: formulas, checkpoints, diffusers folders. A teacher is a Denoiser."""

from emd_fast.teachers import diffusers, edm
from emd_fast.teachers.analytic import gaussian, gaussian_mixture

__all__ = ["diffusers", "edm", "gaussian", "gaussian_mixture"]
