"""Network passes of a training step, by which studies give every variant the same budget."""

from __future__ import annotations

from emd_fast.config import EMDConfig


def passes(config: EMDConfig) -> float:
    """Counts the network passes of an optimizer step, per sample of the batch.

    A forward pass counts 1, a backward pass to the input 1, and a full backward pass 2. Where z does not
    move, E-step and M-step share one pass of the generator. The rungs of samples are drawn evenly, so
    that a rollout takes (calls - 1) / 2 passes on average.
    """
    k = config.langevin_steps if config.objective == "emd" else 1
    moves_z = config.objective == "emd" and config.gamma_z != 0
    fake_score = config.fake_score_updates * (1 + 1 + 2)
    scores = k * ((1 if config.guidance is None else 2) + 1)
    if config.objective == "sid":
        scores *= 2  # backward passes to the input
    if config.sampling == "x_z":
        generated = 2 * (k + 1) if moves_z else 1
    else:
        generated = 2 * k if moves_z else 0
    rollouts = (config.fake_score_updates + 1) * (config.calls - 1) / 2
    return fake_score + scores + generated + 1 + 2 + rollouts
