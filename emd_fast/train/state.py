"""What a trainer needs to go on: its tensors and facts in a checkpoint, and whether that is one of the same run."""

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
RESUMABLE = {
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
                if shape != (() if key == "step" else tuple(shards.whole[index].shape)) or not dtype.is_floating_point:
                    raise CheckpointError(f"{path} does not fit this {name}: {key} of {parameter} is {shape}, {dtype}")
                # Made here, before anything is read: what an optimizer would make at its first step comes too late.
                own = shards.parameters[index]
                value = torch.zeros(shape, dtype=dtype, device=own.device)
                if shape == tuple(shards.whole[index].shape):
                    # In the parameter's memory format: a fused optimizer reads both from first byte to last.
                    value = torch.zeros_like(own, dtype=dtype, requires_grad=False)
                states[name].setdefault(index, {})[key] = value
                tensors[full] = shards.like(index, value)
            for index, state in states[name].items():
                if state.keys() - {"step"} != {"exp_avg", "exp_avg_sq"}:
                    raise CheckpointError(
                        f"{path} does not fit this {name}: of {shards.names[index]} it has {', '.join(sorted(state))} "
                        "instead of the two moments of AdamW"
                    )
            if len(counters.get(name, ())) != len(self.optimizers[name].param_groups):
                raise CheckpointError(f"{path} does not fit this {name}: its optimizer has other groups of parameters")
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


@dataclass(frozen=True)
class SavedFacts:
    """What the facts of a checkpoint say of the run.

    Args:
        config: that the run was made with.
        step, skipped: steps done, and updates left out.
        teacher: {"path": str or None, "sha256": its fingerprint}.
        counters: as `State.counters` gives them.
    """

    config: EMDConfig
    step: int
    skipped: float
    teacher: dict[str, Any]
    counters: dict[str, list[dict[str, int]]]


def read_facts(path: str | Path, facts: Mapping[str, Any]) -> SavedFacts:
    """Checks the facts of a checkpoint, which may come from anybody.

    Raises:
        CheckpointError: a fact that is missing or of another form, or a configuration that this
            release does not know.
    """
    match facts:
        case {
            "config": dict() as config,
            "step": int() as step,
            "skipped": int() | float() as skipped,
            "teacher": {"path": None | str(), "sha256": str()} as teacher,
            "groups": dict() as counters,
        } if 0 <= step < 2**62 and 0 <= skipped < 2**62 and all(map(_are_counters, counters.values())):
            pass
        case _:
            raise CheckpointError(f"{path} is not a checkpoint of a trainer: its facts are missing or of another form")
    try:
        return SavedFacts(from_dict(EMDConfig, config), step, skipped, teacher, counters)
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{path} holds a configuration this release cannot read: {error}") from None


def _are_counters(groups: Any) -> bool:
    return type(groups) is list and all(
        type(group) is dict and group.keys() <= {"step"} and all(type(step) is int for step in group.values())
        for group in groups
    )


def check_config(path: str | Path, saved: EMDConfig, now: EMDConfig) -> None:
    """Whether two legs of one run may have these.

    Raises:
        CheckpointError: they may not.
    """
    # A schedule that ends at the last step is another one when the last step moves.
    may_change = RESUMABLE - ({"steps"} if saved.lr_schedule != "constant" else set())
    for item in dataclasses.fields(EMDConfig):
        was, is_now = getattr(saved, item.name), getattr(now, item.name)
        if was != is_now and item.name not in may_change:
            raise CheckpointError(
                f"{path} was made with {item.name} = {was!r}, not {is_now!r}; another run needs another folder"
            )


def check_teacher(path: str | Path, saved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Whether the teacher that a checkpoint was made with is the one that is here.

    Raises:
        CheckpointError: it is another one.
    """
    if saved["sha256"] != here["sha256"]:
        was, now = (f"{facts['path'] or 'no file'}, SHA-256 {facts['sha256'][:12]}" for facts in (saved, here))
        raise CheckpointError(
            f"{path} was made with a teacher of other weights ({was}) than this one ({now}): "
            "give the one it was made with, or distil into another folder"
        )
