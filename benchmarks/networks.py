"""Networks of the whole-network benchmarks, built from their configurations with random weights."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import emd_fast
from emd_fast import Denoiser, Generator, schedules
from emd_fast.config import ConfigError

VARIANTS: dict[str, dict[str, Any]] = {"fused": {}, "fused, compiled": {"compile": True}}
"""Arguments of fuse() by contender."""


@dataclass(frozen=True)
class NetworkSpec:
    """How to build a network, and its inputs.

    Attributes:
        sample_shape: (C, H, W) of a sample.
        classes: the number of class labels; 0 for none.
        text: (tokens, channels) of a text embedding; None for none.
    """

    build: Callable[[], nn.Module]
    sample_shape: tuple[int, ...]
    classes: int = 0
    text: tuple[int, int] | None = None

    def condition(self, batch: int, device: torch.device) -> Tensor | None:
        if self.text:
            return torch.randn(batch, *self.text, device=device, generator=torch.Generator(device).manual_seed(0))
        return torch.arange(batch, device=device) % self.classes if self.classes else None


def _small() -> nn.Module:
    from emd_fast.teachers.small_unet import SmallUNet

    return SmallUNet(1)


def _sd15() -> nn.Module:
    try:
        from diffusers import UNet2DConditionModel
    except ImportError:
        raise ConfigError("sd15 needs diffusers (pip install diffusers)") from None
    network: Any = UNet2DConditionModel(cross_attention_dim=768, sample_size=64)
    return _Sample(network)


def _adm() -> nn.Module:
    from emd_fast.teachers.edm_networks import DhariwalUNet
    from emd_fast.teachers.edm_networks.arguments import DhariwalArguments

    return DhariwalUNet(DhariwalArguments(64, 3, 3, 1000))


class _Sample(nn.Module):
    """Adapts a diffusers network to the call network(x, t, text)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Any:
        return self.network(x, t, cond).sample


NETWORKS = {
    "small": NetworkSpec(_small, (1, 8, 8), classes=10),
    "adm": NetworkSpec(_adm, (3, 64, 64), classes=1000),
    "sd15": NetworkSpec(_sd15, (4, 64, 64), text=(77, 768)),
}


def denoiser(kind: NetworkSpec, seed: int, device: torch.device) -> Denoiser:
    """Builds a denoiser with random weights everywhere, since freshly initialised UNets return 0."""
    torch.manual_seed(seed)
    with device:
        network = kind.build()
    with torch.no_grad():
        for parameter in network.parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.1
            parameter.copy_(scale * torch.randn_like(parameter) + (parameter.dim() == 1))
    made = Denoiser(network, schedules.EDM(), "edm", sigma_data=0.5, sample_shape=kind.sample_shape)
    return made.to(device).eval()


class Networks:
    """Generator, teacher and fake score with random weights, and a cache of fused copies."""

    def __init__(self, kind: str, device: torch.device, autocast: bool) -> None:
        self.kind, self.device, self.autocast = NETWORKS[kind], device, autocast
        teacher, fake_score, generator = (denoiser(self.kind, seed, device) for seed in range(3))
        self.plain = (Generator(generator, 2.0).to(device).eval(), teacher, fake_score)
        for network in self.plain[1:]:
            network.requires_grad_(False)
        self._cache: dict[str, Any] = {}

    def cached(self, name: str, make: Callable[[], Any]) -> Any:
        """Returns the result of `make`, which is called once per name."""
        if name not in self._cache:
            self._cache[name] = make()
        return self._cache[name]

    def fused(self, variant: str) -> tuple[Any, Any, Any]:
        def make() -> tuple[Any, ...]:
            copies = copy.deepcopy(self.plain)
            for network in copies:
                emd_fast.fuse(network, **VARIANTS[variant])
            return copies

        made: tuple[Any, Any, Any] = self.cached(variant, make)
        return made

    def in_dtype_of(self, x: Tensor) -> tuple[Any, Any, Any]:
        """Returns the unfused networks; copies in float64 if x is float64."""
        if x.dtype != torch.float64:
            return self.plain
        made: tuple[Any, Any, Any] = self.cached("double", lambda: tuple(n.double() for n in copy.deepcopy(self.plain)))
        return made

    @contextlib.contextmanager
    def precision(self, x: Tensor) -> Iterator[None]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast and x.dtype != torch.float64):
            yield


@functools.cache
def networks(kind: str, device: torch.device, autocast: bool) -> Networks:
    if kind not in NETWORKS:
        raise ConfigError(f"the network must be one of {', '.join(NETWORKS)}, got {kind!r}")
    return Networks(kind, device, autocast)


@functools.cache
def flops(kind: str) -> float:
    """Returns the FLOPs of one forward pass of one sample, counted on the meta device: nothing is computed."""
    spec, meta = NETWORKS[kind], torch.device("meta")
    with meta:
        network = Denoiser(spec.build(), schedules.EDM(), "edm", sigma_data=0.5, sample_shape=spec.sample_shape)
        label = torch.zeros(1, dtype=torch.int64) if spec.classes else None
        cond = torch.zeros(1, *spec.text) if spec.text else label
        x, t = torch.zeros(1, *spec.sample_shape), torch.ones(1)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network.to(meta).eval()(x, t, cond)
    return float(counter.get_total_flops())
