"""langevin_eps on the CPU: B = 128, 3x64x64, two bfloat16 outputs, against eager PyTorch written out of place.

python benchmarks/langevin_eps.py [THREADS]
"""

from __future__ import annotations

import sys

import torch
from alternate import medians, table
from torch import Tensor

from emd_fast import Noise, ops, use_backend

SHAPE = (128, 3, 64, 64)


def eager(eps: Tensor, drift: Tensor, outputs: list[Tensor], coefs: Tensor, alpha: Tensor, sigma: Tensor, gamma: float):
    """The formulas as a user would write them, PyTorch's own generator for the noise."""
    k = coefs[:, :, None, None, None]
    delta = k[:, 0] * outputs[0] + k[:, 1] * outputs[1]
    pull = sigma[:, None, None, None] * delta
    drift = (1 - gamma) * drift + gamma * pull
    eps = eps + gamma * (pull - eps) + (2 * gamma) ** 0.5 * torch.randn_like(eps)
    return eps, drift, (alpha[:, None, None, None] * delta).to(outputs[0].dtype)


@torch.no_grad()
def main(threads: int) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    noise = Noise(0)
    eps, drift = torch.randn(SHAPE), torch.zeros(SHAPE)
    outputs = [torch.randn(SHAPE).bfloat16() for _ in range(2)]
    coefs, alpha, sigma = torch.randn(len(eps), 2), torch.rand(len(eps)) + 0.1, torch.rand(len(eps)) + 0.1
    arguments = (outputs, coefs, alpha, sigma)

    def fused() -> Tensor:
        return ops.langevin_eps(eps, drift, None, *arguments, step_size=0.16, noise=noise)

    with use_backend("reference"):
        kept = eps.clone(), drift.clone()
        expected = ops.langevin_eps(*kept, None, *arguments, step_size=0.16, noise=noise)
    mine = eps.clone(), drift.clone()
    with use_backend("cpu"):
        found = ops.langevin_eps(*mine, None, *arguments, step_size=0.16, noise=noise)
    for a, b in zip((*mine, found), (*kept, expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2 if a.dtype == torch.bfloat16 else 1e-5, atol=1e-5)

    compiled = torch.compile(eager)
    contenders = {
        "eager": lambda: eager(eps, drift, *arguments, 0.16),
        "torch.compile": lambda: compiled(eps, drift, *arguments, 0.16),
        "emd_fast, cpu": fused,
        "the noise alone": lambda: ops.normal(SHAPE, noise, stream=2),
    }
    title = f"langevin_eps, {SHAPE}, bfloat16 outputs, {threads} threads, torch {torch.__version__}, medians of 50"
    print(table(title, medians(contenders), against="eager"))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else torch.get_num_threads())
