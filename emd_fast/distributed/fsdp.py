"""Detection of FSDP2 networks, and control over when their parameters are gathered.

It makes no difference who sharded them: this library or the caller.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakSet

from torch import nn

Use = tuple[nn.Module, str]
_HELD: WeakSet[nn.Module] = WeakSet()
_BY_BLOCK: WeakSet[nn.Module] = WeakSet()
# The attribute of a network whose parameters are those of a sharded one: that network.
_LENDER = "_emd_fast_lender"


def is_fsdp(module: Any) -> bool:
    """Whether `fully_shard` was applied to this module."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # not imported here: the import takes seconds
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def is_sharded(network: nn.Module) -> bool:
    """Whether `fully_shard` was applied to any module of this network."""
    return any(True for _ in _fsdp_modules(network))


def gather_by_block(network: nn.Module) -> None:
    """Makes a sharded network gather each block at each pass, also inside `gathered`.

    FSDP2's own hooks gather a block before its forward pass, free it after, and do the same around
    its backward pass. They start the next block's all-gather while a block computes.

    Args:
        network: sharded as a whole, with its weights, by `shard`. No pass was made yet.
    """
    root: Any = network
    # FSDP2 reads the dtype of gradients here, once. A first pass inside `frozen` would find none.
    root._get_fsdp_state()._lazy_init()
    _BY_BLOCK.update(_fsdp_modules(network))


def gathers_by_block(network: Any) -> bool:
    """Whether `gather_by_block` was applied to a network. Its ranks must then make the same passes."""
    return any(module in _BY_BLOCK for module in _fsdp_modules(network))


def sync_gradients(network: nn.Module, wanted: bool) -> None:
    """Enables or disables gradient reduction in the next backward pass of a sharded network."""
    for module in _fsdp_modules(network):
        module.set_requires_gradient_sync(wanted, recurse=False)


@contextlib.contextmanager
def gathered(*modules: Any) -> Iterator[None]:
    """Context manager: gathers FSDP2 parameters once and keeps them for all passes inside.

    Backward passes do not reshard either. Parameters are gathered before the block runs, so that a
    block that freezes parameters freezes the gathered ones. FSDP2 reads the dtype of its gradients
    once, from the sharded parameters. Blocks may nest. All modules are resharded at the end, also
    after an error. Plain modules, DDP modules and arguments that are not modules are ignored.
    Networks that gather by block (`gather_by_block`) go on doing so.
    """
    found = _unique(_fsdp_modules(*modules))
    by_block = [m for m in found if m in _BY_BLOCK]
    mine = [m for m in found if m not in _HELD and m not in _BY_BLOCK]
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
        for module in (*mine, *by_block):
            if failed:
                _forget_pass(module)
            _forget_order(module)
            if failed or module not in _BY_BLOCK:
                module.reshard()


def _hold(module: Any) -> Callable[[], None]:
    """Turns off resharding after passes of a module. Returns a function that restores its policy.

    FSDP2 has setters for the policy but no getters, so this reads private attributes.
    """
    state = module._get_fsdp_state()
    automatic = state._auto_reshard_after_forward
    policies = [(group, group.post_forward_mesh_info, group.reshard_after_backward) for group in _groups(state)]
    module.set_reshard_after_forward(False, recurse=False)
    module.set_reshard_after_backward(False, recurse=False)

    def restore() -> None:
        state._auto_reshard_after_forward = automatic
        for group, after_forward, after_backward in policies:
            # FSDP2 decides at the first pass that its root stays gathered between forward and
            # backward. That pass may have run inside the block, so the same decision is made here.
            group.post_forward_mesh_info = None if automatic and state._is_root else after_forward
            group.reshard_after_backward = after_backward

    return restore


def _forget_pass(module: Any) -> None:
    """Resets the state of a pass that an error has interrupted.

    FSDP2 would otherwise not reshard.
    """
    state = module._get_fsdp_state()
    if hasattr(module, "reset_iter_state"):
        if state._is_root:
            module.reset_iter_state()
        return
    # The body of reset_iter_state, for a PyTorch that lacks it. No gather is in flight at this
    # point.
    if state._is_root is None:  # no pass has started
        return
    for part in (state, *_groups(state)):
        part._training_state = type(part._training_state).IDLE
    state._modules_to_run_forward.clear()
    state._comm_ctx.post_forward_order.clear()
    state._state_ctx.iter_forward_root = None
    state._state_ctx.post_backward_final_callback_queued = False


def _forget_order(module: Any) -> None:
    """Empties the list of passes by which FSDP2 finds the block to gather next in a backward pass.

    FSDP2 itself empties it at the end of a backward pass only. It would grow with every pass without
    gradients, and the first block would gather a block of an earlier pass.
    """
    state = module._get_fsdp_state()
    if state._is_root is None:  # no pass has started
        return
    state._comm_ctx.post_forward_order.clear()
    for group in _groups(state):
        group._post_forward_indices.clear()


def _groups(state: Any) -> list[Any]:
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:  # before torch 2.12
        groups = [state._fsdp_param_group]
    return [group for group in groups if group is not None]


def lend(lender: nn.Module, borrower: nn.Module, uses: Mapping[Use, Sequence[Use]]) -> None:
    """Makes a network follow the parameters of a sharded one, gathered or not.

    The borrower is gathered with the lender, and has no hooks of FSDP2 itself: its passes need
    `gathered`.

    Args:
        uses: (module, name) of a parameter of the lender -> where it hangs in the borrower.
    """
    # Past nn.Module: the lender is no part of the borrower.
    borrower.__dict__[_LENDER] = lender
    for module in _fsdp_modules(lender):
        for parameter in (p for group in _groups(module._get_fsdp_state()) for p in group.fsdp_params):
            # FSDP2 keeps parameters that several modules share up to date in the same lists.
            info = parameter._module_info
            for its_module, its_name in uses.get((info.module, info.param_name), ()):
                info.shared_modules.append(its_module)
                info.shared_param_names.append(its_name)


def _fsdp_modules(*modules: Any) -> Iterator[Any]:
    if "torch.distributed.fsdp" not in sys.modules:
        return
    for module in modules:
        if isinstance(module, nn.Module):
            yield from filter(is_fsdp, module.modules())
            yield from _fsdp_modules(vars(module).get(_LENDER))


def _unique(modules: Iterator[Any]) -> list[Any]:
    return list(dict.fromkeys(modules))
