"""Reference backend in plain PyTorch. It defines the correct result and runs everywhere."""

from emd_fast.backends.reference.attention import attention, attention_backward
from emd_fast.backends.reference.geglu import geglu, geglu_backward
from emd_fast.backends.reference.group_norm import group_norm, group_norm_backward
from emd_fast.backends.reference.integers import integers
from emd_fast.backends.reference.langevin_eps import langevin_eps
from emd_fast.backends.reference.langevin_z import langevin_z
from emd_fast.backends.reference.m_step_loss import m_step_loss, m_step_loss_backward
from emd_fast.backends.reference.normal import normal
from emd_fast.backends.reference.perturb import perturb
from emd_fast.backends.reference.residual import residual
from emd_fast.backends.reference.score_matching_loss import score_matching_loss, score_matching_loss_backward
from emd_fast.backends.reference.uniform import uniform

OPS = {
    function.__name__: function
    for function in (
        uniform,
        normal,
        integers,
        perturb,
        langevin_eps,
        langevin_z,
        m_step_loss,
        m_step_loss_backward,
        score_matching_loss,
        score_matching_loss_backward,
        group_norm,
        group_norm_backward,
        residual,
        geglu,
        geglu_backward,
        attention,
        attention_backward,
    )
}
