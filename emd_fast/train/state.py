"""The state of a trainer in a checkpoint: its tensors, its facts, and whether they belong to the same run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from emd_fast.config import ConfigError, EMDConfig, forbidden_change, from_dict
from emd_fast.diffusion.denoiser import Denoiser
from emd_fast.train import checkpoint, optimizers
from emd_fast.train.checkpoint import CheckpointError
from emd_fast.train.fingerprint import other_process, sizes_of
from emd_fast.train.learner import Learner


@dataclass(frozen=True)
class State:
    """The tensors that training changes, by "part.name": weights, averages and optimizer moments.

    Args:
        modules: by part; their parameters and buffers are state.
        learners: the parts that are trained. Their moments are "part_optimizer.parameter.moment".
        own: by part, the names that are state; all of a part that is not there. The others are
            those of the teacher, which a checkpoint does not hold.
    """

    modules: Mapping[str, nn.Module]
    learners: Mapping[str, Learner]
    own: Mapping[str, frozenset[str]] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, as a checkpoint writes them."""
        tensors = self._weights()
        for name, learner in self.learners.items():
            trainable = learner.trainable
            for index, parameter in enumerate(trainable.parameters):
                for key, value in learner.optimizer.state.get(parameter, {}).items():
                    if isinstance(value, Tensor):
                        tensors[f"{name}_optimizer.{trainable.names[index]}.{key}"] = trainable.like(
                            index, optimizers.plain(value)
                        )
        return tensors

    def counters(self) -> dict[str, list[dict[str, int]]]:
        """The counters that an optimizer keeps in its groups instead of in tensors (apex: the step)."""
        return {
            name: [
                {"step": group["step"]} if isinstance(group.get("step"), int) else {}
                for group in learner.optimizer.param_groups
            ]
            for name, learner in self.learners.items()
        }

    def clipped(self) -> dict[str, list[int]]:
        """The numbers of clipped updates and of updates of each part that is trained. Waits for the device."""
        return {name: learner.clipping.counts() for name, learner in self.learners.items()}

    def restore(self, path: Path, saved: SavedFacts) -> None:
        """Reads the tensors of a checkpoint in place, and takes the counters of its facts.

        Raises:
            CheckpointError: a damaged checkpoint, or one of another architecture; the error names
                the tensor that does not fit.
        """
        there = checkpoint.shapes(path)
        moments = {name: _Moments(name, learner, path, there) for name, learner in self.learners.items()}
        for name, learner in self.learners.items():
            if len(saved.counters.get(name, ())) != len(learner.optimizer.param_groups):
                raise CheckpointError(f"{path} does not fit this {name}: its optimizer has other groups of parameters")
        tensors = self._weights()
        for own in moments.values():
            tensors |= own.tensors
        checkpoint.restore(path, tensors)
        for name, own in moments.items():
            own.load(saved.counters[name])
            self.learners[name].clipping.restore(*saved.clipped.get(name, (0, 0)))

    def _weights(self) -> dict[str, Tensor]:
        return {
            f"{part}.{name}": tensor
            for part, module in self.modules.items()
            for name, tensor in module.state_dict().items()
            if part not in self.own or name in self.own[part]
        }


class _Moments:
    """The moments of one optimizer, allocated before anything is read.

    An optimizer would allocate them at its first step, which is after loading.
    """

    def __init__(
        self, name: str, learner: Learner, path: Path, there: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    ) -> None:
        self.learner = learner
        self.tensors: dict[str, Tensor] = {}
        self._states: dict[int, dict[str, Any]] = {}
        trainable = learner.trainable
        index_of = {parameter: index for index, parameter in enumerate(trainable.names)}
        misfit = f"{path} does not fit this {name}"
        prefix = f"{name}_optimizer."
        for full in [full for full in there if full.startswith(prefix)]:
            parameter, _, key = full.removeprefix(prefix).rpartition(".")
            if parameter not in index_of:
                raise CheckpointError(f"{misfit}: it has no {parameter}")
            index, (shape, dtype) = index_of[parameter], there[full]
            whole = tuple(trainable.whole[index].shape)
            if shape != (() if key == "step" else whole) or not dtype.is_floating_point:
                raise CheckpointError(f"{misfit}: {key} of {parameter} is {shape}, {dtype}")
            own = trainable.parameters[index]
            value = torch.zeros(shape, dtype=dtype, device=own.device)
            if shape == whole:
                # A fused optimizer reads weights and moments in memory order, so the formats must agree.
                value = torch.zeros_like(own, dtype=dtype, requires_grad=False)
            self._states.setdefault(index, {})[key] = value
            self.tensors[full] = trainable.like(index, value)
        for index, state in self._states.items():
            if state.keys() - {"step"} != {"exp_avg", "exp_avg_sq"}:
                raise CheckpointError(
                    f"{misfit}: of {trainable.names[index]} it has {', '.join(sorted(state))} "
                    "instead of the two moments of AdamW"
                )

    def load(self, counters: list[dict[str, int]]) -> None:
        """Hands the moments and the counters to the optimizer."""
        optimizer = self.learner.optimizer
        for index, state in self._states.items():
            own = self.learner.trainable.parameters[index]
            for key, value in state.items():
                state[key] = optimizers.as_kept(optimizer, own, key, value)
        groups = optimizer.state_dict()["param_groups"]
        for group, counted in zip(groups, counters, strict=True):
            group.update(counted)
        optimizer.load_state_dict({"state": self._states, "param_groups": groups})


@dataclass(frozen=True)
class SavedFacts:
    """The facts of a trainer's checkpoint.

    Attributes:
        config: configuration of the run.
        step, skipped: number of steps done, number of updates skipped.
        teacher: {"path": str or None, "sha256": fingerprint}; "process" too, if this release wrote it.
        counters: as returned by `State.counters`.
        clipped: as returned by `State.clipped`; empty in a checkpoint without these numbers.
    """

    config: EMDConfig
    step: int
    skipped: float
    teacher: dict[str, Any]
    counters: dict[str, list[dict[str, int]]]
    clipped: dict[str, list[int]]


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
            raise _foreign(path)
    clipped = facts.get("clipped", {})
    if not (isinstance(clipped, dict) and all(map(_are_clipped, clipped.values()))):
        raise _foreign(path)
    try:
        return SavedFacts(from_dict(EMDConfig, config, "emd"), step, skipped, teacher, counters, clipped)
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{path} holds a configuration this release cannot read: {error}") from None


def _foreign(path: str | Path) -> CheckpointError:
    return CheckpointError(f"{path} is not a checkpoint of a trainer: its facts are missing or of another form")


def _are_clipped(counts: Any) -> bool:
    return (
        type(counts) is list and [type(count) for count in counts] == [int, int] and 0 <= counts[0] <= counts[1] < 2**62
    )


def _are_counters(groups: Any) -> bool:
    return type(groups) is list and all(
        type(group) is dict and group.keys() <= {"step"} and all(type(step) is int for step in group.values())
        for group in groups
    )


def check_config(path: str | Path, saved: EMDConfig, now: EMDConfig) -> None:
    """Checks that a run of configuration `saved` may go on with `now`.

    Raises:
        CheckpointError: a value differs that must not change within a run.
    """
    change = forbidden_change(saved, now)
    if change is not None:
        raise CheckpointError(
            f"{path} was made with {change.key} = {change.was!r}, not {change.now!r}; another run needs another folder"
        )


def check_process(path: str | Path, saved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Checks that the teacher of a checkpoint has the noise process of the one given now.

    The coefficients of the generator follow from it, so samples and exports depend on it too.

    Raises:
        CheckpointError: another schedule or parametrization, or other times of the network.
    """
    if "process" in saved and (said := other_process(saved["process"], here["process"])):
        raise CheckpointError(
            f"{path} was made with another noise schedule or parametrization of the teacher ({said}): restore "
            "the teacher's scheduler, or distil into another folder"
        )


def check_sizes(path: str | Path, saved: SavedFacts, teacher: Denoiser, trains: bool) -> None:
    """Checks that the teacher given now has the sizes of a checkpoint, before anything is made for its sizes.

    Sampling and export take a teacher of other sizes, unless the times of the run have a shift for each size.

    Raises:
        CheckpointError: the run draws from other sizes.
    """
    times = saved.config.time_distribution, saved.config.fake_score_time_distribution
    if trains or any(isinstance(each.shift, list) for each in times):
        _check_shapes(path, saved.teacher, sizes_of(teacher.sample_shapes))


def check_teacher(path: str | Path, saved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Checks that the teacher of a checkpoint has the weights and the sizes of the one given now.

    Raises:
        CheckpointError: the fingerprints differ, or the run draws from other sizes.
    """
    _check_shapes(path, saved, here)
    if saved["sha256"] != here["sha256"]:
        was, now = (f"{facts['path'] or 'no file'}, SHA-256 {facts['sha256'][:12]}" for facts in (saved, here))
        raise CheckpointError(
            f"{path} was made with a teacher of other weights ({was}) than this one ({now}): "
            "give the one it was made with, or distil into another folder"
        )


def _check_shapes(path: str | Path, saved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    if saved.get("shapes") != here.get("shapes"):
        raise CheckpointError(
            f"{path} was made with samples of {_told(saved)}, not of {_told(here)}: give the teacher the same sizes, "
            "or distil into another folder"
        )


def _told(facts: Mapping[str, Any]) -> str:
    return f"the shapes {facts['shapes']}" if facts.get("shapes") else "one shape"
