"""Captures the E-step as one CUDA graph to remove launch overhead at small batch sizes.

Its speed has not been measured on a GPU yet.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from emd_fast import backends
from emd_fast.diffusion.denoiser import Condition
from emd_fast.distributed import is_sharded
from emd_fast.em.e_step import sample_eps_z
from emd_fast.em.streams import branches
from emd_fast.em.types import EStep, GeneratorLike, LangevinSettings
from emd_fast.noise import Noise

_logger = logging.getLogger("emd_fast")

SMALL_BATCH = 16
"""Batch size up to which teacher and fake score run on two streams: neither fills a GPU alone."""


@dataclass(frozen=True)
class _Captured:
    replay: Callable[[], None]
    inputs: list[Tensor]
    found: EStep
    addresses: list[int]


@dataclass(frozen=True)
class GraphFacts:
    """What decides whether a graph pays.

    Attributes:
        device_type: of the networks, "cuda" or another.
        obstacle: why the networks cannot be captured (`obstacle`); None if they can.
        samples: samples in a pass of a network.
    """

    device_type: str
    obstacle: str | None
    samples: int


def worth_a_graph(facts: GraphFacts) -> tuple[bool, str]:
    """Whether to capture the E-step under cuda_graph = "auto", and the reason in one line.

    The limit on samples was counted and not measured. A Langevin step of ADM starts 2,244 kernels,
    whatever the batch. Those of 16 samples compute for about 35 ms at the rates of an H200, less than
    the host needs to start them; those of 64 samples for about 140 ms.
    """
    if facts.device_type != "cuda":
        return False, f"{facts.device_type} tensors have no graphs"
    if facts.obstacle:
        return False, facts.obstacle
    if facts.samples > SMALL_BATCH:
        return False, f"a pass of {facts.samples} samples is more than {SMALL_BATCH}, and keeps the device busy"
    return True, f"a pass of {facts.samples} samples is at most {SMALL_BATCH}, and the host would limit it"


def obstacle(networks: Sequence[Any]) -> str | None:
    """Why generator, teacher and fake score cannot be captured. None if they can."""
    for name, network in zip(("generator", "teacher", "fake_score"), networks, strict=True):
        if not isinstance(network, nn.Module):
            return f"the {name} is no module, and where its parameters lie is not known"
        if is_sharded(network):
            return f"the {name} is sharded, and its parameters have no fixed address"
    return None


class GraphedEStep:
    """`e_step` of fixed networks and settings, captured once per shape and replayed bit for bit.

        settings = {"steps": 8, "gamma_eps": 0.1, "gamma_z": 0.01, "noise": noise}
        sample = GraphedEStep(generator, teacher, fake_score, **settings)
        found = sample(z, eps, t, cond)

    A replay reads the current parameters, noise (`noise.set` and `noise.advance` work as usual)
    and arguments. The graph is captured again if a parameter has moved.

    e_step runs without a graph, and the reason is logged once, where capture is impossible:
    tensors that are not on a GPU, parameters that FSDP2 has sharded (they have no fixed address),
    a network that is not a module, or a network that makes the host wait for the device.

    Args:
        generator, teacher, fake_score, guidance, null_cond, integrator, steps, noise: as for
            e_step.
        gamma_eps, gamma_z: as for e_step, or None if they are given with every call.
        measures: as for LangevinSettings.
        parallel: whether teacher and fake score run on two streams. None: for batches up to
            SMALL_BATCH.
    """

    def __init__(
        self,
        generator: GeneratorLike,
        teacher: Any,
        fake_score: Any,
        *,
        steps: int,
        noise: Noise,
        gamma_eps: float | Tensor | None = None,
        gamma_z: float | Tensor | None = None,
        guidance: float | Tensor | None = None,
        null_cond: Condition = None,
        integrator: str = "euler",
        measures: bool = False,
        parallel: bool | None = None,
    ) -> None:
        self.networks: tuple[Any, Any, Any] = (generator, teacher, fake_score)
        self.noise = noise
        self._step_sizes = (gamma_eps, gamma_z)
        self._settings: dict[str, Any] = {
            "steps": steps,
            "noise": noise,
            "guidance": guidance,
            "null_cond": null_cond,
            "integrator": integrator,
            "measures": measures,
        }
        self._parallel = parallel
        self._captured: dict[Hashable, _Captured] = {}
        self._refused: dict[Hashable, str] = {}

    def __call__(
        self,
        z: Tensor,
        eps: Tensor,
        t: Tensor,
        cond: Condition = None,
        *,
        gamma_eps: float | Tensor | None = None,
        gamma_z: float | Tensor | None = None,
    ) -> EStep:
        """Returns the posterior sample for z, eps, t, cond in new tensors. Values are not checked."""
        sizes = [
            given if given is not None else own
            for given, own in zip((gamma_eps, gamma_z), self._step_sizes, strict=True)
        ]
        if any(size is None for size in sizes):
            raise ValueError("gamma_eps and gamma_z must be given, here or to GraphedEStep")
        arguments = (z, eps, t, cond, *sizes)
        if reason := self._why_not(z):
            _say_once(reason)
            return self._eager(*arguments)
        leaves, structure = pytree.tree_flatten(arguments)
        key = self._key(leaves, structure)
        if key in self._refused:
            return self._eager(*arguments)
        captured = self._captured.get(key)
        if captured is None or captured.addresses != self._addresses():
            self._captured.pop(key, None)  # frees its memory before the new capture
            try:
                captured = self._captured[key] = self._capture(leaves, structure)
            except RuntimeError as error:
                torch.cuda.synchronize(z.device)
                self._refused[key] = " ".join(str(error).split())[:200]
                _say_once(f"it cannot be captured: {self._refused[key]}")
                return self._eager(*arguments)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        torch._foreach_copy_(captured.inputs, [tensor.detach() for tensor in tensors])
        captured.replay()
        return EStep(*pytree.tree_map_only(Tensor, Tensor.clone, tuple(vars(captured.found).values())))

    def _eager(self, z: Tensor, eps: Tensor, t: Tensor, cond: Condition, gamma_eps: Any, gamma_z: Any) -> EStep:
        settings = LangevinSettings(gamma_eps=gamma_eps, gamma_z=gamma_z, **self._settings)
        return sample_eps_z(self.networks, z, eps, t, cond, settings)

    def _why_not(self, z: Tensor) -> str | None:
        if z.device.type != "cuda":
            return f"{z.device.type} tensors have no graphs"
        return obstacle(self.networks)

    def _key(self, leaves: list[Any], structure: Any) -> Hashable:
        facts = [(leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
        modes = [module.training for network in self.networks for module in network.modules()]
        return tuple(facts), structure, autocast, tuple(modes), backends.active()

    def _addresses(self) -> list[int]:
        tensors = [t for network in self.networks for t in (*network.parameters(), *network.buffers())]
        return [tensor.data_ptr() for tensor in (*tensors, self.noise.state)]

    def _capture(self, leaves: list[Any], structure: Any) -> _Captured:
        own = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        arguments = pytree.tree_unflatten(own, structure)
        parallel = len(arguments[0]) <= SMALL_BATCH if self._parallel is None else self._parallel
        replay, found = _graph(lambda: self._eager(*arguments), parallel, arguments[0].device)
        return _Captured(replay, [leaf for leaf in own if isinstance(leaf, Tensor)], found, self._addresses())


def _graph(run: Callable[[], EStep], parallel: bool, device: torch.device) -> tuple[Callable[[], None], EStep]:
    """Captures `run`. Returns the replay function, and the tensors that a replay writes to."""
    # Without a stream argument PyTorch captures on the stream of the process's first capture,
    # which may belong to another device. Nothing would be recorded there, and a replay would do
    # nothing.
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        # A warm-up before the capture compiles kernels and allocates workspaces.
        with torch.cuda.stream(side):
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # A replay must cast the current weights, so the casts must be captured and not come from
        # autocast's cache. Casts made inside the capture belong to the graph alone.
        torch.clear_autocast_cache()
        # With "thread_local", CUDA calls of other threads (a loader that pins memory, a library's
        # monitor) neither enter the graph nor abort the capture.
        capture = torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local")
        try:
            with capture, branches(parallel):
                found = run()
        finally:
            torch.clear_autocast_cache()
    return graph.replay, found


@functools.cache
def _say_once(reason: str) -> None:
    _logger.warning("the E-step runs without a CUDA graph: %s", reason)
