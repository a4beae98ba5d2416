"""Floating-point operations of the three networks in a step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from emd_fast.config import EMDConfig
from emd_fast.diffusion.denoiser import Condition, Denoiser
from emd_fast.train.adapters import NAMES


@dataclass(frozen=True)
class Work:
    """Floating-point operations of a forward pass of each network for one sample; their mean over its sizes."""

    teacher: float
    generator: float
    fake_score: float

    @classmethod
    def of(cls, teacher: Denoiser, generator: nn.Module, fake_score: Denoiser, classes: int = 0) -> Work:
        """Counts the matmuls, convolutions and attention that PyTorch knows, from shapes alone.

        Args:
            classes: number of classes; 0 if the condition is not a label. Texts have the most tokens that
                the teacher's pipeline makes.

        Raises:
            RuntimeError: a network depends on values, which only a real pass provides.
        """
        cond, t = torch.zeros(1, dtype=torch.int64) if classes else teacher.blank_condition(), torch.ones(1)
        shapes, latent = teacher.sample_shapes or ((),), getattr(generator, "latent_shape", None)

        def counted(shape: tuple[int, ...]) -> tuple[float, float, float]:
            x, z = torch.zeros(1, *shape), torch.zeros(1, *(latent or shape))
            given = (x, t, cond)
            return _operations(teacher, *given), _operations(generator, z, cond), _operations(fake_score, *given)

        return cls(*(sum(each) / len(shapes) for each in zip(*map(counted, shapes), strict=True)))

    def step(self, config: EMDConfig) -> float:
        """Estimates the operations of a training step for one sample.

        A backward pass counts as one forward pass if it goes to the input alone (the Langevin
        steps in z, a network with an adapter), as two if it includes the weights, and as one more if
        activations are recomputed. The extra operations of attention's backward pass, and those of
        adapters, are ignored.
        """
        k = config.langevin_steps if config.objective == "emd" else 1
        moves_z = config.objective == "emd" and config.gamma_z != 0
        adapted = config.adapter.networks if config.adapter.rank else ()
        learning = {name: 3 - (name in adapted) + config.compute.activation_checkpointing for name in NAMES}
        fake_score = config.fake_score_updates * (self.generator + learning["fake_score"] * self.fake_score)
        scores = k * ((1 if config.guidance is None else 2) * self.teacher + self.fake_score)
        if config.objective == "sid":
            scores *= 2  # backward passes to the input
        if config.sampling == "x_z":
            generated = (2 * (k + 1) if moves_z else 1) * self.generator
        else:
            # Where z does not move, one pass serves E-step and M-step, unless the M-step recomputes activations
            # or takes the batch in parts.
            compute = config.compute
            again = bool(compute.activation_checkpointing or compute.micro_batch_size)
            generated = (2 * k if moves_z else again) * self.generator
        # A rung is drawn evenly for every update and E-step, and the rungs before it are run.
        earlier = (config.fake_score_updates + 1) * (config.calls - 1) / 2 * self.generator
        return fake_score + scores + generated + earlier + learning["generator"] * self.generator


def _operations(network: nn.Module, *arguments: Condition) -> float:
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    # An analytic network without parameters may need values, and is cheap to compute.
    device = "meta" if any(True for _ in network.parameters()) else "cpu"
    moved = {name: tensor.detach().to(device) for name, tensor in tensors.items()}
    given = pytree.tree_map_only(
        Tensor, lambda leaf: leaf if leaf.device.type == device else leaf.to(device), arguments
    )
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        torch.func.functional_call(network, moved, given)
    return float(counter.get_total_flops())
