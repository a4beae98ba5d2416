"""What fuse() does to a network: norms, attention, conditioning, compiled blocks."""

from emd_fast.conditioning import conditioning_cache
from emd_fast.unet.plan import fuse, fusion_report, unfuse
from emd_fast.unet.report import FusionReport

__all__ = ["FusionReport", "conditioning_cache", "fuse", "fusion_report", "unfuse"]
