"""Training of one network: gradient accumulation over micro-batches and ranks, optimizer steps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from emd_fast import distributed
from emd_fast.config import EMDConfig
from emd_fast.distributed import TrainableParameters
from emd_fast.train import optimizers, precision
from emd_fast.train.activation_checkpoint import activation_checkpoint
from emd_fast.train.clipping import Clipping


class Learner:
    """A network in training, its trainable parameters and its optimizer. All ranks make the same calls.

    Args:
        network: bare or sharded; its parameters that require gradients are trained.
        lr: learning rate before warm-up and schedule.
        compute_dtype: of the forward and backward passes, by autocast.
        config: the distillation.
        device: of the passes; shards may be in host memory.

    Raises:
        ConfigError: the optimizer is not installed.
        ValueError: no parameter requires a gradient.
    """

    def __init__(
        self, network: nn.Module, lr: float, compute_dtype: torch.dtype, config: EMDConfig, device: torch.device
    ) -> None:
        self.network, self.lr = network, lr
        self.trainable = TrainableParameters(network)
        self.optimizer = optimizers.make(config.optimizer, self.trainable.parameters, lr)
        self._dtype, self._config = compute_dtype, config
        self._device = device
        self.clipping = Clipping(config.optimizer.grad_clip, device)

    def schedule(self, step: int) -> None:
        """Sets the learning rate of an optimizer step."""
        scale = optimizers.rate_scale(self._config.optimizer, step, self._config.steps)
        optimizers.set_rate(self.optimizer, self.lr * scale)

    def accumulate(self, micro_batches: Sequence[Any], losses: Callable[[Any], Tensor]) -> Tensor:
        """Computes the gradient of this rank's samples, in place of the one before.

        Args:
            losses: (B,) losses of a micro-batch of B samples.

        Returns:
            Device scalar: the sum of the losses over this rank's samples, divided by the batch of all ranks.
        """
        self.trainable.clear_gradients()
        total = torch.zeros((), device=self._device)
        for number, micro_batch in enumerate(micro_batches, 1):
            distributed.sync_gradients(self.network, number == len(micro_batches))
            with precision.autocast(self._dtype, self._device), self._checkpointing():
                loss = losses(micro_batch).sum() / self._config.batch_size
            loss.backward()
            total = total + loss.detach()
        return total

    def update(self) -> Tensor:
        """Makes one optimizer step with the gradients of all ranks.

        The step is skipped, on the device and on every rank, where a gradient is not finite.

        Returns:
            Device scalar: the norm of the whole gradient before clipping.
        """
        self.trainable.reduce_gradients()
        norms = self.trainable.gradient_norms()
        norm = torch.linalg.vector_norm(norms)
        self.clipping.clip(self.trainable.parameters, norm)
        finite = torch.isfinite(norm)
        self.trainable.note_bad(norms)
        if optimizers.skips_on_device(self.optimizer):
            # GradScaler tells a fused optimizer in this way to skip the update without a host sync.
            self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
            self.optimizer.step()
        elif bool(finite):
            self.optimizer.step()
        return norm.to(self._device, non_blocking=True)

    def _checkpointing(self) -> contextlib.AbstractContextManager[None]:
        if self._config.compute.activation_checkpointing:
            return activation_checkpoint(self.network)
        return contextlib.nullcontext()
