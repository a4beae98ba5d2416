"""What a trainer needs to go on, as its checkpoint has it, and whether a checkpoint is one of the same run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from emd_fast.config import ConfigError, EMDConfig, from_dict
from emd_fast.distributed import TrainableParameters
from emd_fast.train import checkpoint, optimizers
from emd_fast.train.checkpoint import CheckpointError

# What may change between two legs of one run; everything else makes it another run. They change time, memory, limits
# and the order in which numbers are summed.
MAY_CHANGE = {
    "steps",
    "max_z_rms",
    "max_skipped",
    "micro_batch_size",
    "parallel",
    "shard_group",
    "fuse",
    "compile",
    "cuda_graph",
    "activation_checkpointing",
}


@dataclass(frozen=True)
class State:
    """Weights, averages and moments: the tensors that training changes, by "part.name".

    Args:
        modules: by part; their parameters and buffers count.
        shards, optimizers: of the parts that learn; the moments of such a part are "part_optimizer.parameter.moment".
    """

    modules: Mapping[str, nn.Module]
    shards: Mapping[str, TrainableParameters]
    optimizers: Mapping[str, torch.optim.Optimizer]

    def tensors(self) -> dict[str, Tensor]:
        """All of them, for a checkpoint to write."""
        tensors = self._weights()
        for name, optimizer in self.optimizers.items():
            shards = self.shards[name]
            for index, parameter in enumerate(shards.parameters):
                for key, value in optimizer.state.get(parameter, {}).items():
                    if isinstance(value, Tensor):
                        tensors[f"{name}_optimizer.{shards.names[index]}.{key}"] = shards.like(
                            index, optimizers.plain(value)
                        )
        return tensors

    def counters(self) -> dict[str, list[dict[str, int]]]:
        """What each optimizer counts in its groups (apex: the step) instead of in its tensors."""
        return {
            name: [
                {"step": group["step"]} if isinstance(group.get("step"), int) else {}
                for group in optimizer.param_groups
            ]
            for name, optimizer in self.optimizers.items()
        }

    def restore(self, path: Path, counters: Mapping[str, list[dict[str, int]]]) -> None:
        """Reads the tensors of a checkpoint, and the counters that its facts have, in place.

        Raises:
            CheckpointError: one of another architecture, named by the tensor that does not fit; one that is damaged.
        """
        tensors, there = self._weights(), checkpoint.shapes(path)
        states: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in self.shards}
        for name, shards in self.shards.items():
            index_of = {parameter: index for index, parameter in enumerate(shards.names)}
            part = f"{name}_optimizer."
            for full in [full for full in there if full.startswith(part)]:
                parameter, _, key = full.removeprefix(part).rpartition(".")
                if parameter not in index_of:
                    raise CheckpointError(f"{path} does not fit this {name}: it has no {parameter}")
                index = index_of[parameter]
                shape, dtype = there[full]
                # Made here, before anything is read: what an optimizer would make at its first step comes too late.
                own = shards.parameters[index]
                value = torch.zeros(shape, dtype=dtype, device=own.device)
                if shape == tuple(shards.whole[index].shape):
                    # In the parameter's memory format: a fused optimizer reads both from first byte to last.
                    value = torch.zeros_like(own, dtype=dtype, requires_grad=False)
                states[name].setdefault(index, {})[key] = value
                tensors[full] = shards.like(index, value)
        checkpoint.restore(path, tensors)
        for name, optimizer in self.optimizers.items():
            for index, state in states[name].items():
                own = self.shards[name].parameters[index]
                for key, value in state.items():
                    state[key] = optimizers.as_kept(optimizer, own, key, value)
            groups = optimizer.state_dict()["param_groups"]
            for group, counted in zip(groups, counters[name], strict=True):
                group.update(counted)
            optimizer.load_state_dict({"state": states[name], "param_groups": groups})

    def _weights(self) -> dict[str, Tensor]:
        return {
            f"{part}.{name}": tensor
            for part, module in self.modules.items()
            for name, tensor in module.state_dict().items()
        }


def config_of(path: str | Path, facts: Mapping[str, Any]) -> EMDConfig:
    """The configuration that a checkpoint was made with.

    Raises:
        CheckpointError: one that this release does not know.
    """
    try:
        return from_dict(EMDConfig, facts["config"])
    except (ConfigError, KeyError) as error:
        raise CheckpointError(f"{path} holds a configuration this release cannot read: {error}") from None


def check_config(path: str | Path, saved: EMDConfig, now: EMDConfig) -> None:
    """Whether two legs of one run may have these.

    Raises:
        CheckpointError: they may not.
    """
    # A schedule that ends at the last step is another one when the last step moves.
    may_change = MAY_CHANGE - ({"steps"} if saved.lr_schedule != "constant" else set())
    for item in dataclasses.fields(EMDConfig):
        was, is_now = getattr(saved, item.name), getattr(now, item.name)
        if was != is_now and item.name not in may_change:
            raise CheckpointError(
                f"{path} was made with {item.name} = {was!r}, not {is_now!r}; another run needs another folder"
            )


def check_teacher(path: str | Path, saved: Mapping[str, Any] | None, here: Mapping[str, Any]) -> None:
    """Whether the teacher that a checkpoint was made with is the one that is here.

    Raises:
        CheckpointError: it is another one.
    """
    if saved is not None and saved["sha256"] != here["sha256"]:  # checkpoints of before do not say it
        was, now = (f"{facts['path'] or 'no file'}, SHA-256 {facts['sha256'][:12]}" for facts in (saved, here))
        raise CheckpointError(
            f"{path} was made with a teacher of other weights ({was}) than this one ({now}): "
            "give the one it was made with, or distil into another folder"
        )
