"""cuDNN's attention, called by name: PyTorch's own order tries it last.

The op is called directly, since `torch.nn.attention.sdpa_kernel` sets a flag of the process at each
call, for all threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LEAST_VERSION = 90000
_DTYPES = (torch.bfloat16, torch.float16)


def why_not(device_type: str) -> str | None:
    """Reason (one line) why cuDNN cannot serve attention on this device type. None if it can."""
    if device_type != "cuda":
        return "it serves cuda tensors only"
    version = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    if version is None or version < _LEAST_VERSION:
        return f"it needs cuDNN 9, and PyTorch has {version or 'none'}"
    if not torch.backends.cuda.cudnn_sdp_enabled():
        return "torch.backends.cuda.enable_cudnn_sdp(False) is set"
    if torch.are_deterministic_algorithms_enabled():
        return "torch.use_deterministic_algorithms is set, and its backward pass is not deterministic"
    return None


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention by cuDNN on (B, tokens, heads, head_dim). Differentiable.

    Raises:
        RuntimeError: cuDNN has no kernel for this call.
    """
    reason = None
    if q.dtype not in _DTYPES:
        reason = "it takes bfloat16 and float16"
    elif q.shape[3] % 8:
        reason = "the head dim is no multiple of 8"
    elif k.shape[1] == 1:
        reason = "it has no kernel for one key"
    if reason:
        raise RuntimeError(f"backend 'cudnn' cannot run attention on {tuple(q.shape)} {q.dtype}: {reason}")
    backward = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    heads_first = (t.transpose(1, 2) for t in (q, k, v))
    out: Tensor = torch.ops.aten._scaled_dot_product_cudnn_attention(*heads_first, None, backward, scale=scale)[0]
    return out.transpose(1, 2)
