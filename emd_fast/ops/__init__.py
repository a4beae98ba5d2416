"""The fused ops.

Each op has a file of its name here, in every backend that has it, in tests/ and in benchmarks/.
"""

from emd_fast.ops.attention import attention
from emd_fast.ops.geglu import geglu
from emd_fast.ops.group_norm import group_norm
from emd_fast.ops.integers import integers
from emd_fast.ops.langevin_eps import langevin_eps
from emd_fast.ops.langevin_z import langevin_z
from emd_fast.ops.m_step_loss import m_step_loss
from emd_fast.ops.normal import normal
from emd_fast.ops.perturb import perturb
from emd_fast.ops.residual import residual
from emd_fast.ops.score_matching_loss import score_matching_loss
from emd_fast.ops.uniform import uniform

__all__ = [
    "attention",
    "geglu",
    "group_norm",
    "integers",
    "langevin_eps",
    "langevin_z",
    "m_step_loss",
    "normal",
    "perturb",
    "residual",
    "score_matching_loss",
    "uniform",
]
