"""Backend of attention on a GPU under "auto": the first row of TABLE that matches the call.

A row states the fastest backend for these calls. For calls with a gradient, it counts forward and
backward together, since one backend cannot read what another has saved. **No attention was
measured on a GPU so far.** The rows for Hopper are an expectation: PyTorch tries flash-attention 2
first, which has no Hopper instructions, and cuDNN last, which has. The tile sizes of the Triton
kernels have a table of their own, triton/attention_tiles.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")
_ANY = (0, 2**63 - 1)


@dataclass(frozen=True)
class Row:
    """A row of the table: a backend and the calls it serves. A field left out matches every call.

    Args:
        backend: "sdpa", "cudnn", "triton", "xformers" or "reference".
        architectures: compute capabilities, 90 for 9.0.
        head_dims, dtypes: the measured ones.
        tokens, keys: smallest and largest length of queries and keys.
        gradient: True for calls that will be differentiated, False for the others.
    """

    backend: str
    architectures: tuple[int, ...] = ()
    head_dims: tuple[int, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()
    tokens: tuple[int, int] = _ANY
    keys: tuple[int, int] = _ANY
    gradient: bool | None = None

    def fits(
        self, architecture: int, head_dim: int, dtype: torch.dtype, tokens: int, keys: int, gradient: bool
    ) -> bool:
        return (
            (not self.architectures or architecture in self.architectures)
            and (not self.head_dims or head_dim in self.head_dims)
            and (not self.dtypes or dtype in self.dtypes)
            and self.tokens[0] <= tokens <= self.tokens[1]
            and self.keys[0] <= keys <= self.keys[1]
            and self.gradient in (None, gradient)
        )


_HALF = (torch.bfloat16, torch.float16)
_MORE_THAN_ONE = (2, 2**63 - 1)  # cuDNN has no kernel for one key

TABLE = (
    # Not measured. Head dims of ADM (64) and Stable Diffusion 1.5 (40, 80, 160).
    Row("cudnn", (90,), (40, 64, 80), _HALF, keys=_MORE_THAN_ONE),
    # With a gradient, head dim 160 stays with flash-attention 2, which PyTorch takes first.
    Row("cudnn", (90,), (160,), _HALF, keys=_MORE_THAN_ONE, gradient=False),
    Row("sdpa"),
)


def choose(architecture: int, head_dim: int, dtype: torch.dtype, tokens: int, keys: int, gradient: bool) -> str:
    """Backend of the first row that matches the call, or "sdpa" if none does."""
    for row in TABLE:
        if row.fits(architecture, head_dim, dtype, tokens, keys, gradient):
            return row.backend
    return "sdpa"


def backends(architecture: int | None = None) -> list[str]:
    """Backends that the table names for this architecture (for any if None), in its order."""
    rows = (r for r in TABLE if architecture is None or not r.architectures or architecture in r.architectures)
    return list(dict.fromkeys(row.backend for row in rows))


def constant_when_compiled(function: Callable[P, T]) -> Callable[P, T]:
    """Same as torch.compiler.assume_constant_result, without importing the compiler and Triton."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_when_compiled  # evaluated at compile time
def architecture(device: torch.device) -> int:
    """Compute capability of a GPU, 90 for 9.0."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
