"""Who computes attention on a GPU where nobody names a backend: the first row of TABLE that fits the call.

A row is a measurement: the backend that was fastest there, forward and backward together where a gradient is wanted,
since what one backend saves another cannot read. **No attention was measured on a GPU so far**, so the one row leaves
everything to PyTorch. The tiles of the Triton kernels are a table of their own, in triton/attention_tiles.py.
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
    """What is left out fits everything.

    Args:
        backend: "sdpa", "triton", "xformers" or "reference".
        architectures: compute capabilities, 90 for 9.0.
        head_dims, dtypes: those that were measured.
        tokens, keys: first and last length, of queries and of keys.
        gradient: True for calls that will be differentiated, False for others.
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


TABLE = (
    # For example Row("triton", (90,), (40, 80), (torch.bfloat16,), tokens=(1024, 4096), keys=(77, 77), gradient=False).
    Row("sdpa"),
)


def choose(architecture: int, head_dim: int, dtype: torch.dtype, tokens: int, keys: int, gradient: bool) -> str:
    """The backend of the first row that fits; "sdpa" where none does."""
    for row in TABLE:
        if row.fits(architecture, head_dim, dtype, tokens, keys, gradient):
            return row.backend
    return "sdpa"


def backends(architecture: int | None = None) -> list[str]:
    """Every backend that the table names for this GPU (for any, when None), in its order."""
    rows = (r for r in TABLE if architecture is None or not r.architectures or architecture in r.architectures)
    return list(dict.fromkeys(row.backend for row in rows))


def constant_when_compiled(function: Callable[P, T]) -> Callable[P, T]:
    """torch.compiler.assume_constant_result without what that imports: the compiler, and Triton with it."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_when_compiled  # compiled code asks before it runs, and not while
def architecture(device: torch.device) -> int:
    """The compute capability of a GPU, 90 for 9.0."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
