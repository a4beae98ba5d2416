"""What fuse() does to a network: norms, attention, conditioning, compiled blocks."""

from emd_fast.cache.conditioning import conditioning_cache
from emd_fast.fusion.fusing import fuse, fusion_report, unfuse
from emd_fast.fusion.summary import FusionReport

__all__ = ["FusionReport", "conditioning_cache", "fuse", "fusion_report", "unfuse"]
