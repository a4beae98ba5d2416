"""Where teachers come from. A teacher is an emd_fast.Denoiser."""

from emd_fast.teachers import diffusers, edm
from emd_fast.teachers.analytic import gaussian, gaussian_mixture

__all__ = ["diffusers", "edm", "gaussian", "gaussian_mixture"]
