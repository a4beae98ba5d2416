"""What identifies a teacher: a SHA-256 hash of its weights, and its noise process in numbers."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from emd_fast.diffusion.denoiser import Denoiser

_TIMES = 5
_COLUMNS = ("t", "alpha", "sigma", "c_in", "c_noise", "c_skip", "c_out")
_TOLERANCE = 1e-4  # machines round differently


def fingerprint(network: nn.Module) -> str:
    """SHA-256 of a network's state_dict, in hexadecimal: names, shapes, dtypes and bytes.

    The hash is the same on every device, and the same for a network that was fused or wrapped by
    torch.compile.

    Args:
        network: not sharded. Of tensors on the meta device only name, shape and dtype are hashed.
    """
    state = {name.replace("_orig_mod.", ""): tensor for name, tensor in network.state_dict().items()}
    whole = hashlib.sha256()
    with ThreadPoolExecutor() as threads:  # hashlib releases the GIL
        for name, digest in zip(sorted(state), threads.map(_digest, map(state.get, sorted(state))), strict=True):
            whole.update(f"{name} {tuple(state[name].shape)} {state[name].dtype} {digest}\n".encode())
    return whole.hexdigest()


def process_of(teacher: Denoiser) -> list[list[float]]:
    """Schedule, parametrization and network inputs of a Denoiser, at a few times: rows of `_COLUMNS`."""
    schedule = teacher.schedule
    t = torch.linspace(schedule.t_min, schedule.t_max, _TIMES, dtype=torch.float32, device="cpu")
    columns = (t, schedule.alpha(t), schedule.sigma(t), *teacher.network_inputs(t), *teacher.coefficients(t))
    return [[float(value) for value in row] for row in torch.stack([column.float() for column in columns], 1)]


def sizes_of(shapes: Sequence[Sequence[int]]) -> dict[str, list[list[int]]]:
    """{"shapes": of x} of a teacher of several sizes, and nothing of a teacher of one."""
    return {"shapes": [list(shape) for shape in shapes]} if len(shapes) > 1 else {}


def other_process(saved: Any, here: list[list[float]]) -> str | None:
    """The first number in which two noise processes differ, in words; None if they agree to rounding.

    Args:
        saved: what a checkpoint states, which may come from anybody.
        here: from `process_of`.
    """
    form = isinstance(saved, list) and [len(row) for row in saved if isinstance(row, list)] == [len(_COLUMNS)] * _TIMES
    if not form or not all(type(value) in (int, float) for row in saved for value in row):
        return "it does not state one"
    for was, now in zip(saved, here, strict=True):
        for name, a, b in zip(_COLUMNS, was, now, strict=True):
            if not math.isclose(a, b, rel_tol=_TOLERANCE, abs_tol=1e-6):
                return f"{name} was {a:.4g}, and is {b:.4g} at t = {now[0]:.4g}"
    return None


def _digest(tensor: Tensor) -> str:
    if tensor.is_meta:
        return ""
    held: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(held).hexdigest()
