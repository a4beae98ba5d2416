"""Schedule, parametrization and network times from the configuration of a scheduler of diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from emd_fast.config import ConfigError
from emd_fast.diffusion.schedules import VP, RectifiedFlow, Schedule
from emd_fast.io import reading
from emd_fast.io.reading import shown
from emd_fast.teachers.diffusers.weights import check_kinds

_FLOW = "FlowMatchEulerDiscreteScheduler"
# With use_flow_sigmas and "flow_prediction" they sample rectified flows.
_SOLVERS = ("UniPCMultistepScheduler", "DPMSolverMultistepScheduler")
# Their chain has a lower signal-to-noise ratio, by snr_shift_scale.
_SHIFTED = ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler")
_CHAINS = (
    "DDPMScheduler",
    "DDIMScheduler",
    "PNDMScheduler",
    "LMSDiscreteScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    *_SHIFTED,
)
_BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace")
_MOST_STEPS = 2**20
_PLAIN = {"timestep_type": "discrete", "use_flow_sigmas": False, "invert_sigmas": False}
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
# The value that diffusers uses as the last alpha^2 of a chain with zero terminal signal.
_LAST_ALPHA_SQUARED = 2.0**-24


@dataclass(frozen=True)
class SchedulerInfo:
    """How a network was trained.

    Args:
        schedule: the noise schedule.
        parametrization: kind of the network's output.
        index_scale: factor from t to the time input of the network: N - 1 for a chain of N betas,
            N for a rectified flow.
        betas: the betas of a chain; empty for a rectified flow.
    """

    schedule: Schedule
    parametrization: str
    index_scale: float
    betas: tuple[float, ...] = ()

    def index(self, t: Tensor) -> Tensor:
        return self.index_scale * t


def read(config: Mapping[str, Any]) -> SchedulerInfo:
    """Reads how a network was trained from the contents of a scheduler_config.json.

    Raises:
        ConfigError: the scheduler or prediction type is not supported. The message lists those that
            are.
    """
    import diffusers

    name = config.get("_class_name")
    if not isinstance(name, str) or not name.isidentifier() or len(name) > 100:
        raise ConfigError(f"the scheduler {shown(name)} is not supported: {', '.join((*_CHAINS, _FLOW))} are")
    is_flow = config.get("use_flow_sigmas") is True and config.get("prediction_type") == "flow_prediction"
    flows = name in _SOLVERS and is_flow
    _check_plain(name, {**config, "use_flow_sigmas": False} if flows else config)
    if name == _FLOW or flows:
        return SchedulerInfo(RectifiedFlow(), "flow", float(_steps(config)))
    if name not in _CHAINS:
        raise ConfigError(f"the scheduler {name} is not supported: {', '.join((*_CHAINS, _FLOW))} are")
    prediction = config.get("prediction_type", "epsilon")
    if not isinstance(prediction, str) or prediction not in PREDICTIONS:
        raise ConfigError(
            f"prediction_type {shown(prediction)} of {name} is not supported: {', '.join(PREDICTIONS)} are"
        )
    kind = config.get("beta_schedule", "linear")
    if config.get("trained_betas") is None and kind not in _BETAS:
        raise ConfigError(f"beta_schedule {shown(kind)} of {name} is not supported: {', '.join(_BETAS)} are")
    # DDPM supports every kind of betas. The other classes but those of CogVideoX differ in the sampling only.
    asked: tuple[str, ...] = (
        "num_train_timesteps",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "trained_betas",
        "rescale_betas_zero_snr",
    )
    if name in _SHIFTED:
        asked += ("snr_shift_scale",)
    wanted = {key: config[key] for key in asked if key in config}
    _steps(config)
    try:
        kind = getattr(diffusers, name) if name in _SHIFTED else diffusers.DDPMScheduler
        check_kinds(kind, wanted)
        chain: Any = kind(**({} if name in _SHIFTED else {"beta_schedule": "linear"}) | wanted)
        betas = _with_signal(_betas_of(chain.alphas_cumprod) if name in _SHIFTED else chain.betas.double())
        schedule = VP(betas)
    except Exception as error:  # diffusers raises exceptions of many kinds
        raise ConfigError(f"the scheduler {name} has no betas that can be used: {reading.reason(error)}") from None
    return SchedulerInfo(schedule, PREDICTIONS[prediction], float(len(betas) - 1), tuple(betas.tolist()))


def _check_plain(name: str, config: Mapping[str, Any]) -> None:
    """Refuses settings that give the network other times or other inputs.

    Raises:
        ConfigError: one of them.
    """
    for key, plain in _PLAIN.items():
        if config.get(key, plain) != plain:
            raise ConfigError(f"a {name} with {key} = {shown(config[key])} is not supported: {plain!r} is")


def _steps(config: Mapping[str, Any]) -> int:
    """The number of training steps of a scheduler, which bounds its table of betas."""
    steps, betas = config.get("num_train_timesteps", 1000), config.get("trained_betas")
    if type(steps) is not int or not 1 < steps <= _MOST_STEPS:
        raise ConfigError(f"num_train_timesteps must be a number from 2 to {_MOST_STEPS:,}, got {shown(steps)}")
    if betas is not None:
        is_list = type(betas) in (list, tuple) and 1 < len(betas) <= _MOST_STEPS
        if not is_list or not all(type(beta) in (int, float) for beta in betas):
            raise ConfigError(f"trained_betas must be a list of 2 to {_MOST_STEPS:,} numbers")
    return steps


def _betas_of(alphas_squared: Tensor) -> Tensor:
    squared = alphas_squared.double()
    return 1 - squared / torch.cat([squared.new_ones(1), squared[:-1]])


def _with_signal(betas: Tensor) -> Tensor:
    """Changes the last beta of a rescaled chain so that alpha stays positive and log alpha finite."""
    if betas[-1] < 1:
        return betas
    before = torch.prod(1 - betas[:-1])
    # alpha must decrease, and the alpha of the index before may be below the value of diffusers.
    last = torch.clamp(before / 4, max=_LAST_ALPHA_SQUARED)
    return torch.cat([betas[:-1], 1 - (last / before)[None]])
