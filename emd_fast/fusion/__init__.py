"""What fuse() does to a network: norms, attention, conditioning, compiled blocks."""

from emd_fast.cache.conditioning import conditioning_cache
from emd_fast.fusion.plan import fuse, fusion_report, unfuse
from emd_fast.fusion.report import FusionReport

__all__ = ["FusionReport", "conditioning_cache", "fuse", "fusion_report", "unfuse"]
