"""Activation checkpointing: the same numbers for less memory."""

import pytest
import torch
from helpers import randomised
from test_trainer import config, digits_teacher, states
from torch.autograd.graph import saved_tensors_hooks

import emd_fast
from emd_fast import Denoiser, EMDTrainer, schedules
from emd_fast.backends import active
from emd_fast.config import ConfigError
from emd_fast.distributed import blocks_of
from emd_fast.teachers.edm_networks import DhariwalUNet
from emd_fast.teachers.edm_networks.arguments import DhariwalArguments
from emd_fast.train.activation_checkpoint import activation_checkpoint


def teacher() -> Denoiser:
    sizes = {"model_channels": 32, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]}
    network = randomised(DhariwalUNet(DhariwalArguments(8, 1, 1, 3, **sizes)), 0, 0.1)
    return Denoiser(network, schedules.EDM(), "edm", sigma_data=0.5, sample_shape=(1, 8, 8))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("objective", ["emd", "sid"])
def test_a_run_is_the_same_bit_for_bit(fused, precision, objective):
    ends = []
    for again in (False, True, "all"):
        network = emd_fast.fuse(teacher()) if fused else teacher()
        small = {"num_classes": 3, "batch_size": 2, "langevin_steps": 1, "fake_score_updates": 1}
        small |= {"objective": objective}
        trainer = EMDTrainer(network, config(**small, precision=precision, activation_checkpointing=again))
        trainer.step()
        trainer.step()
        ends.append(states(trainer))
    if objective == "sid":
        # Without recomputation E-step and M-step share a pass with gradients, whose products PyTorch rounds otherwise.
        del ends[0]
    for end in ends[1:]:
        assert [name for name, value in ends[0].items() if not torch.equal(value, end[name])] == []


def kept(again: bool | str, **changes) -> tuple[int, int]:
    """Bytes that the E-step, and those that M-step and fake-score step keep for their backward passes."""
    chain: list[int] = []
    found: list[int] = []
    trainer = EMDTrainer(teacher(), config(num_classes=3, activation_checkpointing=again, **changes))
    with saved_tensors_hooks(lambda x: chain.append(x.nbytes) or x, lambda x: x):
        sampled = trainer.sample_posterior()
    with saved_tensors_hooks(lambda x: found.append(x.nbytes) or x, lambda x: x):
        trainer._generator_loss([sampled])
        trainer._fake_score_update(None, 0)
    return sum(chain), sum(found)


def test_less_is_kept():
    (chain, steps), (same_chain, fewer), (fewest_chain, fewest) = kept(False), kept(True), kept("all")
    assert fewest == fewer < 0.4 * steps
    assert same_chain == chain and fewest_chain < 0.4 * chain


def test_less_is_kept_of_scores_with_gradients():
    (chain, _), (fewest_chain, _) = kept(True, objective="sid"), kept("all", objective="sid")
    assert fewest_chain < 0.4 * chain


def test_blocks_are_as_before_and_their_own_forward_comes_back():
    network = teacher()
    own = blocks_of(network)[0].forward
    blocks_of(network)[0].forward = own
    with pytest.raises(ZeroDivisionError), activation_checkpoint(network):
        assert all("forward" in block.__dict__ for block in blocks_of(network))
        raise ZeroDivisionError
    first, *rest = blocks_of(network)
    assert first.__dict__["forward"] is own and rest and not any("forward" in block.__dict__ for block in rest)


def test_the_backward_pass_computes_again_on_the_backend_of_the_forward_pass():
    network, seen = teacher(), []
    block = blocks_of(network)[-1]
    original = block.forward
    block.forward = lambda *arguments: seen.append(active()) or original(*arguments)
    with activation_checkpoint(network), emd_fast.use_backend("reference"):
        loss = network(torch.zeros(2, 1, 8, 8), torch.ones(2), torch.zeros(2, dtype=torch.int64)).sum()
    loss.backward()
    assert seen == ["reference", "reference"]


def test_a_network_without_blocks_is_refused():
    with pytest.raises(ConfigError, match="activation_checkpointing must be False: the generator has no blocks"):
        EMDTrainer(digits_teacher(), config(num_classes=3, activation_checkpointing=True))
