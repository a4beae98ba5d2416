"""The networks of EDM and EDM2, with the parameter names of the published checkpoints."""

from emd_fast.teachers.edm_networks.dhariwal import DhariwalUNet
from emd_fast.teachers.edm_networks.edm2 import EDM2UNet
from emd_fast.teachers.edm_networks.song import SongUNet

__all__ = ["DhariwalUNet", "EDM2UNet", "SongUNet"]
