"""Noise schedules, under their public name `emd_fast.schedules`."""

from emd_fast.diffusion.schedules import EDM, VP, Cosine, RectifiedFlow, Schedule

__all__ = ["EDM", "VP", "Cosine", "RectifiedFlow", "Schedule"]
