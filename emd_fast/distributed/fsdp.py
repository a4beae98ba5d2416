"""Networks that FSDP2 has sharded, by whomever: which they are, and when their parameters are gathered."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakSet

from torch import nn

_HELD: WeakSet[nn.Module] = WeakSet()


def is_fsdp(module: Any) -> bool:
    """Whether it is a module that FSDP2 manages."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # importing it to ask would cost everybody who never used it
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def is_sharded(network: nn.Module) -> bool:
    """Whether FSDP2 holds any of its parameters."""
    return any(True for _ in _fsdp_modules(network))


def sync_gradients(network: nn.Module, wanted: bool) -> None:
    """Whether the next backward pass of a sharded network ends in the reduction of its gradients."""
    for module in _fsdp_modules(network):
        module.set_requires_gradient_sync(wanted, recurse=False)


@contextlib.contextmanager
def gathered(*modules: Any) -> Iterator[None]:
    """Inside, FSDP2 parameters are gathered once and kept for all passes, backward passes included.

    Gathering comes before whatever the block does to the parameters, so that a block that freezes them freezes the
    gathered ones: FSDP2 reads the dtype of its gradients from the sharded ones, once. Blocks nest, and leave everything
    sharded when an error leaves them. Plain modules, DDP and what is no module at all pass untouched.
    """
    mine = [m for m in _unique(_fsdp_modules(*modules)) if m not in _HELD]
    undo: list[Callable[[], None]] = []
    failed = True
    try:
        for module in mine:
            _HELD.add(module)
            undo.append(_hold(module))
            module.unshard()
        yield
        failed = False
    finally:
        for module in mine:
            _HELD.discard(module)
        for restore in undo:
            restore()
        for module in mine:
            if failed:
                _forget_pass(module)
            module.reshard()


def _hold(module: Any) -> Callable[[], None]:
    """Keeps what is gathered after the passes of this module; returns what puts its own policy back.

    FSDP2 has setters for the policy and no getters, hence the look inside.
    """
    state = module._get_fsdp_state()
    automatic = state._auto_reshard_after_forward
    policies = [(group, group.post_forward_mesh_info, group.reshard_after_backward) for group in _groups(state)]
    module.set_reshard_after_forward(False, recurse=False)
    module.set_reshard_after_backward(False, recurse=False)

    def restore() -> None:
        state._auto_reshard_after_forward = automatic
        for group, after_forward, after_backward in policies:
            # What FSDP2 does at a first pass, had this not been one: its root stays gathered between the passes.
            group.post_forward_mesh_info = None if automatic and state._is_root else after_forward
            group.reshard_after_backward = after_backward

    return restore


def _forget_pass(module: Any) -> None:
    """An error in the middle of a pass leaves a module in it, where it would not give its parameters back."""
    state = module._get_fsdp_state()
    if hasattr(module, "reset_iter_state"):
        if state._is_root:
            module.reset_iter_state()
        return
    # What that does, before PyTorch has it; of what is gathered already nothing is still under way.
    if state._is_root is None:  # no pass has begun
        return
    for part in (state, *_groups(state)):
        part._training_state = type(part._training_state).IDLE
    state._modules_to_run_forward.clear()
    state._comm_ctx.post_forward_order.clear()
    state._state_ctx.iter_forward_root = None
    state._state_ctx.post_backward_final_callback_queued = False


def _groups(state: Any) -> list[Any]:
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:  # before torch 2.12
        groups = [state._fsdp_param_group]
    return [group for group in groups if group is not None]


def _fsdp_modules(*modules: Any) -> Iterator[Any]:
    if "torch.distributed.fsdp" not in sys.modules:
        return
    for module in modules:
        if isinstance(module, nn.Module):
            yield from filter(is_fsdp, module.modules())


def _unique(modules: Iterator[Any]) -> list[Any]:
    return list(dict.fromkeys(modules))
