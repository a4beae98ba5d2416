from __future__ import annotations

from torch import Tensor

from emd_fast import backends
from emd_fast.noise import Noise, NoiseStream
from emd_fast.ops import _check
from emd_fast.ops._define import define

_op = define(
    "langevin_z",
    "Tensor(a!) z, Tensor z_grad, float step_size, Tensor? step_size_per_sample, bool exact, Tensor noise, "
    "SymInt substep",
    "()",
    fake=lambda *args: None,
)


def langevin_z(
    z: Tensor,
    z_grad: Tensor,
    *,
    step_size: float | Tensor,
    integrator: str = "euler",
    noise: Noise,
    substep: int = 0,
) -> None:
    """Langevin step on the latent, in place: z = z + step_size (z_grad - z) + noise_scale m.

    Args:
        z: (B, ...) float32, contiguous. Updated in place.
        z_grad: J_g(z)^T (alpha delta), with the shape of z, float32, bfloat16 or float16, any
            strides.
        step_size: gamma_z in [0, 1], a number or (B,) float32.
        integrator: "euler", with noise_scale = sqrt(2 step_size), or "exact", with
            noise_scale = sqrt(step_size (2 - step_size)).
        noise, substep: m is drawn from stream 3 at this substep.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device. Nothing is
            written in that case.

    Source: the paper cited at `langevin_eps`.
    """
    _check.state("z", z)
    _check.tensor("z_grad", z_grad, shape=z.shape, like=z)
    step_size, step_size_per_sample = _check.step_size(step_size, z)
    exact = _check.exact(integrator)
    state = _check.noise(noise, NoiseStream.LANGEVIN_Z, substep, len(z), z.device)
    read = {"z_grad": z_grad, **({} if step_size_per_sample is None else {"step_size": step_size_per_sample})}
    _check.written_apart({"z": z}, read)
    _op(z, z_grad.detach(), step_size, step_size_per_sample, exact, state, substep, backends.active())
