"""The E-step of a run, as its configuration asks for it: which chain, and whether as a CUDA graph."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

from emd_fast import distributed
from emd_fast.config import EMDConfig
from emd_fast.em.cuda_graph import GraphedEStep, GraphFacts, obstacle, worth_a_graph
from emd_fast.em.e_step import sample_eps_z
from emd_fast.em.e_step_xz import sample_x_z
from emd_fast.em.sid import sample_sid
from emd_fast.em.types import EStep, LangevinSettings, Networks, Watch
from emd_fast.noise import Noise, NoiseStream
from emd_fast.train.activation_checkpoint import activation_checkpoint
from emd_fast.train.batches import BatchSampler, MicroBatch

_logger = logging.getLogger("emd_fast")


class PosteriorSampler:
    """Samples (eps, z) of micro-batches by the chain of a configuration.

    Attributes:
        captured: whether the E-step runs as a CUDA graph, where it can be captured.
        why: the reason, in one line.

    Args:
        networks: generator, teacher and fake score.
        batches: gives noise, times and step sizes.
        device_type: of the networks.
    """

    def __init__(
        self, config: EMDConfig, networks: Networks, noise: Noise, batches: BatchSampler, device_type: str
    ) -> None:
        self._config, self._networks, self._noise, self._batches = config, networks, noise, batches
        self.steps = config.langevin_steps if config.objective == "emd" else 1
        self._measures = config.weighting == "adaptive"
        self.captured, self.why = captures(config, networks, device_type)
        # One for each size, because the null condition may state the size.
        self._graphed: dict[int, GraphedEStep] = {}

    def __call__(self, batch: MicroBatch, watch: Watch | None = None) -> EStep:
        """Makes the E-step of a micro-batch. `watch` is called after each Langevin step."""
        config, batches = self._config, self._batches
        z, eps = batches.e_step(batch.first, batch.size)
        t = batches.times(config.time_distribution, batch.size, stream=NoiseStream.E_STEP_TIME)
        gamma_eps = batches.step_size(config.gamma_eps, t)
        gamma_z = batches.step_size(config.gamma_z, t) if config.objective == "emd" else 0.0
        if self.captured and watch is None:
            return self._graph()(z, eps, t, batch.cond, gamma_eps=gamma_eps, gamma_z=gamma_z)
        sample = sample_x_z if config.sampling == "x_z" else sample_eps_z
        if config.objective == "sid":
            sample = sample_sid
        generator, *scores = self._networks
        recomputed: list[Any] = []
        if config.compute.activation_checkpointing == "all":
            recomputed = scores if config.objective == "sid" else [generator]
        settings = LangevinSettings(
            self.steps,
            gamma_eps,
            gamma_z,
            self._noise,
            config.guidance,
            batches.sizes.null_cond(),
            config.integrator,
            self._measures,
            keeps_pass=watch is None and self._keeps_pass(batch),
        )
        with contextlib.ExitStack() as stack:
            for network in recomputed:
                stack.enter_context(activation_checkpoint(network))
            return sample(self._networks, z, eps, t, batch.cond, settings, watch)

    def _keeps_pass(self, batch: MicroBatch) -> bool:
        """Whether the M-step may use the E-step's pass of the generator: one graph, of a network that is whole."""
        first, last = distributed.share(self._config.batch_size)
        whole = batch.size == last - first and not self._config.compute.activation_checkpointing
        generator: Any = self._networks[0]
        return whole and not distributed.is_sharded(generator)

    def _graph(self) -> GraphedEStep:
        """The E-step of the current size as a graph, which is captured at its first call."""
        sizes, config = self._batches.sizes, self._config
        if sizes.index not in self._graphed:
            self._graphed[sizes.index] = GraphedEStep(
                *self._networks,
                steps=self.steps,
                noise=self._noise,
                guidance=config.guidance,
                null_cond=sizes.null_cond(),
                integrator=config.integrator,
                measures=self._measures,
            )
        return self._graphed[sizes.index]


def captures(config: EMDConfig, networks: Networks, device_type: str) -> tuple[bool, str]:
    """Whether the E-step is captured as a CUDA graph, and why, in one line."""
    chosen = config.compute.cuda_graph
    if chosen != "auto":
        return chosen, f"cuda_graph is {str(chosen).lower()}"
    first, last = distributed.share(config.batch_size)
    samples = min(config.compute.micro_batch_size or last - first, last - first)
    chain = None
    if config.sampling == "x_z":
        chain = 'sampling "x_z" has no graph'
    elif config.objective == "sid":
        chain = 'objective "sid" has no graph'
    elif config.compute.activation_checkpointing == "all":
        chain = "activations of the Langevin steps are recomputed"
    pays, reason = worth_a_graph(GraphFacts(device_type, chain or obstacle(networks), samples))
    said = f"cuda_graph is auto: {'on' if pays else 'off'}: {reason}"
    _logger.info(said)
    return pays, said
