"""From one process to a cluster: the process group, how a network is spread over it, and what its ranks owe each other.

Reading order: `process_group`, `shard`, `gathered`, `Shards`. Nothing here knows of the algorithm.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")

MODES = ("auto", "replicate", "fsdp", "hybrid")
REPLICATED_UP_TO = 1_000_000_000  # parameters: 16 GB of float32 weights, gradients and AdamW state a network


class GroupError(ValueError):
    """What all ranks find wrong at the same moment, in the same words: the main one alone has to say it."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.main = is_main()


class LostRank(RuntimeError):
    """Another rank has ended or cannot be reached, in the middle of what takes both."""


class FailedOnMain(RuntimeError):
    """What another rank is told of an error that the main one meets, and says."""

    main = False


# The process group ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """The process group that torchrun's variables describe, taken down at the end.

    gloo serves CPU tensors, nccl CUDA tensors; each process takes the GPU of its LOCAL_RANK. Outside of torchrun, and
    where there is a process group already, nothing happens.

    Raises:
        LostRank: inside, the connection to another rank was lost. Any other error as it is; its attribute `main` is
        False where the main rank meets the same, and says it.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ or dist.is_initialized():
        yield
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        backend = "cpu:gloo,cuda:nccl"
    store, own, ranks = next(dist.rendezvous("env://"))
    store = _unused(store)
    dist.init_process_group(backend, store=store, rank=own, world_size=ranks)
    try:
        yield
    except Exception as error:
        if isinstance(error, dist.DistError) or "/gloo/" in str(error):
            reason = re.sub(r"\[\S*/gloo/\S*\] |\. This is typically.*", "", str(error).splitlines()[0])
            raise LostRank(f"rank {own} has lost another rank, which may say why: {reason}") from error
        if not hasattr(error, "main"):  # else it is settled who says it
            vars(error)["main"] = not _left_to_main(store, str(error))
        raise
    finally:
        dist.destroy_process_group()


def _left_to_main(store: dist.Store, message: str) -> bool:
    """Whether this is not the main rank, and that one has the same to say within a moment."""
    said = f"emd_fast {message}"
    try:
        if is_main():
            store.set(said, "")
            # The store may end with this process: not before the others have read it.
            _come(store, [f"{said} {other}" for other in range(1, world_size())])
        elif _come(store, [said]):
            store.set(f"{said} {rank()}", "")
            return True
    except RuntimeError:  # the store has ended
        pass
    return False


def _come(store: dist.Store, keys: list[str]) -> bool:
    """Whether they are there within two seconds; store.wait() would print a warning where they are not."""
    end = time.monotonic() + 2
    while not store.check(keys):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def _unused(store: dist.Store) -> dist.Store:
    """The part of torchrun's store that no earlier attempt has written to.

    With --max-restarts and its default rendezvous, torchrun gives all attempts one store, in which gloo finds the
    addresses of ranks that are dead. Other rendezvous give each attempt a store of its own, and their machines need not
    agree on the number of the attempt: hence each looks for what this machine has left there.
    """
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    mark = f"emd_fast machine {os.environ.get('GROUP_RANK', 0)} attempt"
    store.set(f"{mark} {attempt}", "begun")
    if any(store.check([f"{mark} {earlier}"]) for earlier in range(attempt)):
        return dist.PrefixStore(f"emd_fast attempt {attempt}", store)
    return store


def rank() -> int:
    """Of this process; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Processes in the group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the process that writes and speaks."""
    return rank() == 0


def barrier() -> None:
    """Waits for all ranks, on the host."""
    if world_size() > 1:
        # Of a CPU tensor: with nccl alongside, dist.barrier would make a GPU wait.
        dist.all_reduce(torch.zeros(1))


def share(samples: int) -> tuple[int, int]:
    """The first sample of this rank and the one after its last, of `samples` in all; shares differ by one at most."""
    return rank() * samples // world_size(), (rank() + 1) * samples // world_size()


def on_main(work: Callable[[], T]) -> T:
    """What `work` returns on the main process, on all of them; the others wait.

    Raises:
        Whatever `work` raises there; FailedOnMain, with its message, on the other ranks.
    """
    if world_size() == 1:
        return work()
    told: list[Any] = [None, None]
    failure: BaseException | None = None
    if is_main():
        try:
            told[0] = work()
        except BaseException as error:
            failure, told[1] = error, f"{type(error).__name__} on rank 0: {error}"
            vars(error)["main"] = True  # the others know
    dist.broadcast_object_list(told, src=0)
    if failure is not None:
        raise failure
    if told[1] is not None:
        raise FailedOnMain(told[1])
    return told[0]


def raise_together(error: ValueError | None) -> None:
    """Raises what any rank met on all of them: alone with an error, a rank would leave the others waiting for it."""
    told: list[str | None] = [None] * world_size()
    if world_size() > 1:
        dist.all_gather_object(told, None if error is None else str(error))
    if error is not None:
        raise error
    for other, reason in enumerate(told):
        if reason is not None:
            raise ValueError(f"{reason} (rank {other})")


def check_same(facts: dict[str, Any]) -> None:
    """Whether all ranks have the same facts, plain values, and the same code: ranks that differ would train something
    that none of them was asked for, or wait for each other for ever. All ranks call it alike.

    Raises:
        GroupError: on all ranks alike, naming the first rank that differs from rank 0, in what, and both values.
    """
    if world_size() == 1:
        return
    told: list[Any] = [None] * world_size()
    dist.all_gather_object(told, {**facts, **_code()})
    first = told[0]
    for other, its in enumerate(told):
        for key in sorted({*first, *its}):
            if first.get(key) != its.get(key):
                raise GroupError(
                    f"rank {other} has {key} = {its.get(key)!r}, rank 0 has {first.get(key)!r}: "
                    "start every rank with the same command and the same code"
                )


@functools.cache
def _code() -> dict[str, str]:
    """What tells two installations apart; the source, since a version number stays while files are edited."""
    folder, digest = Path(__file__).parent, hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return {"the source of emd_fast": digest.hexdigest()[:12], "the version of PyTorch": str(torch.__version__)}


class Agreement:
    """The largest number that any rank has given, told to all ranks in the same call.

    The answer is that of the call before, which has arrived by then: nobody waits, and no GPU is asked. In one process
    it is the number itself.
    """

    def __init__(self) -> None:
        self._pending: tuple[Tensor, Any] | None = None

    def __call__(self, number: int) -> int:
        if world_size() == 1:
            return number
        before, flag = self._pending, torch.tensor([number])
        self._pending = (flag, dist.all_reduce(flag, dist.ReduceOp.MAX, async_op=True))
        return _arrived(before)

    def final(self, number: int) -> int:
        """The answer of this call and of the one before it; this one waits."""
        before = self(number)
        pending, self._pending = self._pending, None
        return max(before, number, _arrived(pending))


def _arrived(pending: tuple[Tensor, Any] | None) -> int:
    if pending is None:
        return 0
    flag, work = pending
    work.wait()
    return int(flag)


# A network over the group ---------------------------------------------------------------------------------------------


def resolve(mode: str, parameters: int, ranks: int = 0) -> tuple[str, str]:
    """The mode that "auto" stands for, for a network of so many parameters on so many ranks (all when 0), and why.

    Raises:
        ValueError: an unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(map(repr, MODES))}, got {mode!r}")
    ranks = ranks or world_size()
    if ranks == 1:
        return "replicate", "one process"
    if mode != "auto":
        return mode, "asked for"
    size = f"{parameters / 1e6:,.1f} million parameters"
    limit = f"{REPLICATED_UP_TO / 1e6:,.0f} million"
    if parameters <= REPLICATED_UP_TO:
        return "replicate", f"{size}, of up to {limit} every rank holds a whole copy"
    if 1 < local_size() < ranks:
        return "hybrid", f"{size}, more than {limit}: shards within a machine, copies across machines"
    return "fsdp", f"{size}, more than {limit}: every rank holds a shard"


def local_size() -> int:
    """Processes on this machine, as torchrun says; all of them where it does not."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def check_group(ranks: int, group_size: int) -> None:
    """Whether groups of so many ranks make up all of them.

    Raises:
        GroupError: they do not.
    """
    if group_size < 1 or ranks % group_size:
        raise GroupError(f"shard_group must divide the {ranks} ranks, got {group_size}")


def make_mesh(mode: str, device: torch.device | str, group_size: int = 0) -> DeviceMesh | None:
    """The device mesh of a mode: None for "replicate", one dimension for "fsdp", two for "hybrid".

    Args:
        group_size: ranks that hold one copy together ("hybrid"); those of one machine when 0.

    Raises:
        GroupError: a group size that does not divide the number of ranks.
    """
    if mode == "replicate":
        return None
    from torch.distributed.device_mesh import init_device_mesh

    kind = torch.device(device).type
    if mode == "fsdp":
        return init_device_mesh(kind, (world_size(),), mesh_dim_names=("shard",))
    size = group_size or local_size()
    check_group(world_size(), size)
    return init_device_mesh(kind, (world_size() // size, size), mesh_dim_names=("replicate", "shard"))


def shard(
    network: nn.Module,
    mode: str = "auto",
    *,
    precision: torch.dtype | None = None,
    mesh: DeviceMesh | None = None,
    device: torch.device | str | None = None,
    blocks: Sequence[nn.Module] | None = None,
) -> nn.Module:
    """Spreads a network over the process group, in place, starting from the weights of rank 0.

    "replicate": a whole copy on every rank; `Shards.reduce_gradients` sums the gradients, once. "fsdp": FSDP2, block by
    block; "hybrid": the same within groups of ranks, copies across. "auto": `resolve`. In one process nothing happens.

    Args:
        network: its parameters on the device they are to live on. Or, on all ranks but the first, on the meta device:
            then no other rank ever holds the whole of it, and the first need not have it on its GPU.
        precision: what FSDP2 computes and gathers in, torch.bfloat16 or None for the parameters' own; weights,
            gradients and their reduction stay float32. A network whose parameters all are frozen is converted to it
            and has no float32 copy.
        mesh: of `make_mesh`; networks of one trainer share it. Made here when None.
        device: where it is to live; `device_of` when None.
        blocks: the modules that are gathered one at a time; `blocks_of` when None.

    Returns:
        The network. FSDP2 networks are left as they are.

    Raises:
        ValueError: an unknown mode.
    """
    parameters = list(network.parameters())
    mode, _ = resolve(mode, sum(p.numel() for p in parameters))
    if world_size() == 1 or is_sharded(network):
        return network
    device = device_of(network) if device is None else torch.device(device)
    whole = _leave_to_rank_0(network)
    if mode == "replicate" or not parameters:
        if whole is not None:
            _take_from_rank_0(network, whole, device)
        broadcast(network)
        return network
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    if whole is None:
        broadcast(network)
    if precision is not None and not any(p.requires_grad for p in parameters):
        for parameter in network.parameters():
            parameter.data = parameter.data.to(precision)
    for parameter in network.parameters():
        # FSDP2 takes no weight in channels_last, as `fuse` lays them out on a GPU; its gathered copies are contiguous.
        parameter.data = parameter.data.contiguous()
    # Inputs are not cast: a time in bfloat16 has three digits. Autocast casts where a matrix product wants it.
    policy = MixedPrecisionPolicy(
        param_dtype=precision,
        reduce_dtype=torch.float32 if precision is not None else None,
        cast_forward_inputs=False,
    )
    mesh = mesh if mesh is not None else make_mesh(mode, device)
    # A number alone cannot be split (EDM2 has some): every rank keeps it, and `Shards` sums its gradient.
    numbers = {p for p in network.parameters() if not p.dim()}
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": policy, "ignored_params": numbers}
    for module in blocks_of(network) if blocks is None else blocks:
        fully_shard(module, **options)
    # True also at the root: left gathered after a pass without gradients, it would miss the next optimizer step.
    fully_shard(network, **options, reshard_after_forward=True)
    for module in network.modules():
        if isinstance(module, FSDPModule):
            # Sums, as for "replicate": each rank's loss is already its part of the mean over the global batch.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    if whole is not None:
        _take_from_rank_0(network, whole, device)
        broadcast(network)
    return network


def device_of(network: nn.Module) -> torch.device:
    """Where its first tensor lives. Where some rank has it on the meta device: this process's GPU, or the CPU where
    there is none. All ranks call it alike."""
    tensor = next(iter(_named(network).values()), torch.zeros(()))
    if not _anywhere(tensor.is_meta):
        return tensor.device
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _anywhere(holds: bool) -> bool:
    """Whether it holds on any rank."""
    if world_size() == 1:
        return holds
    flag = torch.tensor([int(holds)])
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def _leave_to_rank_0(network: nn.Module) -> dict[str, Tensor] | None:
    """None where every rank has the network. Else it is on the meta device afterwards, on all of them, and rank 0 gets
    what was in it."""
    tensors = _named(network)
    if not _anywhere(any(t.is_meta for t in tensors.values())):
        return None
    if is_main() and any(t.is_meta for t in tensors.values()):
        raise ValueError("a network on the meta device must have its weights on rank 0")
    held = {name: tensor.detach() for name, tensor in tensors.items()} if is_main() else {}
    network.to("meta")
    return held


@torch.no_grad()
def _take_from_rank_0(network: nn.Module, whole: dict[str, Tensor], device: torch.device) -> None:
    """Gives a network on the meta device its memory; its shards, one tensor at a time, from the whole ones that rank 0
    holds; what is not sharded is left to `broadcast`."""
    network.to_empty(device=device)
    tensor: Any
    for name, tensor in _named(network).items():
        own = local(tensor)
        if hasattr(tensor, "device_mesh"):
            from torch.distributed.tensor import distribute_tensor

            shape = tensor.shape
            full = whole.pop(name).to(own) if is_main() else torch.empty(shape, dtype=own.dtype, device=own.device)
            own.copy_(local(distribute_tensor(full.contiguous(), tensor.device_mesh, tensor.placements)))
        elif is_main():
            own.copy_(whole.pop(name))


def _named(network: nn.Module) -> dict[str, Tensor]:
    """Parameters and all buffers, those that a state dict leaves out too."""
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The entries of the outermost module lists: what networks repeat, and hence what is worth gathering alone."""
    found: list[nn.Module] = []

    def visit(module: nn.Module, listed: bool) -> None:
        for child in module.children():
            if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
                visit(child, True)
            elif not listed:
                visit(child, False)
            elif any(True for _ in child.parameters()):
                found.append(child)

    visit(network, False)
    return found


def is_fsdp(module: Any) -> bool:
    """Whether it is a module that FSDP2 manages."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # importing it to ask would cost everybody who never used it
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def is_sharded(network: nn.Module) -> bool:
    """Whether FSDP2 holds any of its parameters."""
    return any(True for _ in _fsdp_modules(network))


@torch.no_grad()
def broadcast(network: nn.Module) -> None:
    """What is not sharded of the parameters and buffers of rank 0, on every rank."""
    for tensor in _named(network).values():
        if world_size() == 1 or hasattr(tensor, "device_mesh"):
            continue
        whole = tensor.detach().contiguous()
        dist.broadcast(whole, src=0)
        if whole.data_ptr() != tensor.data_ptr():
            tensor.copy_(whole)


def sync_gradients(network: nn.Module, wanted: bool) -> None:
    """Whether the next backward pass of a sharded network ends in the reduction of its gradients."""
    for module in _fsdp_modules(network):
        module.set_requires_gradient_sync(wanted, recurse=False)


# Gathered parameters --------------------------------------------------------------------------------------------------

_HELD: WeakSet[nn.Module] = WeakSet()


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


# What a rank holds of a network's parameters --------------------------------------------------------------------------


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of it: the tensor itself, or the local part of a DTensor, sharing its memory."""
    detached = tensor.detach()
    return detached.to_local() if hasattr(detached, "to_local") else tensor


class Shards:
    """What this rank holds of the trainable parameters of a network: what an optimizer works on.

    For a sharded network these are plain tensors on the memory of its shards, so that any optimizer will do; otherwise
    the parameters themselves.

    Args:
        network: spread by `shard`, or plain.

    Raises:
        ValueError: nothing in it requires a gradient.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        trained = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
        if not trained:
            raise ValueError(f"{type(network).__name__} has no parameters to train")
        self.names = [name for name, _ in trained]
        self.whole = [p for _, p in trained]
        self.parameters = [p if (own := local(p)) is p else nn.Parameter(own) for p in self.whole]
        self.last_bad = torch.full((), -1, dtype=torch.int64, device=self.parameters[0].device)
        self._indices: Tensor | None = None

    def clear_gradients(self) -> None:
        for whole, own in zip(self.whole, self.parameters, strict=True):
            whole.grad = own.grad = None

    def reduce_gradients(self) -> None:
        """The gradients of all ranks, summed, in `parameters`: one all-reduce a dtype for what every rank holds whole;
        what is sharded has been reduced in the backward pass."""
        for whole, own in zip(self.whole, self.parameters, strict=True):
            if own is not whole:
                own.grad = None if whole.grad is None else local(whole.grad)
        if world_size() > 1:
            gradients = [g for i, g in self._gradients() if not self._is_part(i)]
            for dtype in dict.fromkeys(g.dtype for g in gradients):
                some = [g for g in gradients if g.dtype == dtype]
                flat = torch.cat([g.reshape(-1) for g in some])
                dist.all_reduce(flat)
                parts = flat.split([g.numel() for g in some])
                torch._foreach_copy_(some, [part.view_as(g) for part, g in zip(parts, some, strict=True)])

    def gradient_norms(self) -> Tensor:
        """(n,) the norm of each tensor's gradient over all ranks, n those that have one; the same on every rank."""
        gradients = self._gradients()
        norms = torch.stack(list(torch._foreach_norm([g for _, g in gradients])))
        if (group := self._group()) is not None:
            # What every rank of the group holds whole counts once.
            squares = norms.square()
            for place, (i, _) in enumerate(gradients):
                if not self._is_part(i):
                    squares[place] /= dist.get_world_size(group)
            dist.all_reduce(squares, group=group)
            norms = squares.sqrt()
        return norms

    def note_bad(self, norms: Tensor) -> None:
        """Remembers, on the device, the first tensor whose gradient is not finite."""
        bad = ~torch.isfinite(norms)
        if self._indices is None or len(self._indices) != len(norms):  # made once: copying them makes the host wait
            self._indices = torch.tensor([index for index, _ in self._gradients()], device=norms.device)
        first = self._indices.gather(0, bad.int().argmax(keepdim=True))[0]
        self.last_bad = torch.where(bad.any(), first, self.last_bad)

    def bad(self) -> str | None:
        """The name of that tensor, or None; asks the device."""
        index = int(self.last_bad)
        return None if index < 0 else self.names[index]

    def like(self, index: int, tensor: Tensor) -> Tensor:
        """A tensor of the optimizer for parameter `index` as part of a whole, where the parameter is one."""
        whole: Any = self.whole[index]
        if not hasattr(whole, "to_local") or tensor.shape != self.parameters[index].shape:
            return tensor
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(
            tensor,
            whole.device_mesh,
            whole.placements,
            run_check=False,
            shape=whole.shape,
            stride=whole.stride(),
        )

    def _is_part(self, index: int) -> bool:
        """Whether this rank holds a part of parameter `index`, not the whole."""
        return self.parameters[index] is not self.whole[index]

    def _gradients(self) -> list[tuple[int, Tensor]]:
        return [(i, p.grad) for i, p in enumerate(self.parameters) if p.grad is not None]

    def _group(self) -> dist.ProcessGroup | None:
        """The ranks among which a tensor is split, or None."""
        first: Any = next((whole for i, whole in enumerate(self.whole) if self._is_part(i)), None)
        if first is None:
            return None
        split = [i for i, placement in enumerate(first.placements) if placement.is_shard()]
        return first.device_mesh.get_group(split[0]) if split else None
