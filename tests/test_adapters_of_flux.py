"""Adapters on Flux.1, 12 billion parameters on the meta device: memory, plan, size of a checkpoint."""

import dataclasses
from pathlib import Path

import pytest
import torch
from test_trainer import config

from emd_fast import Denoiser, Generator, schedules
from emd_fast.config import AdapterConfig
from emd_fast.run.plan import plan
from emd_fast.train import adapters, networks
from emd_fast.train.memory import GIB
from emd_fast.train.parameter_counts import ParameterCounts

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def flux():
    """FluxTransformer2DModel of Flux.1, 12 billion parameters without memory."""
    diffusers = pytest.importorskip("diffusers")
    from emd_fast.teachers.diffusers import architectures

    with torch.device("meta"):
        model = diffusers.FluxTransformer2DModel(guidance_embeds=True)
    network = architectures.network(model)
    return Denoiser(network, schedules.RectifiedFlow(), "flow", sample_shape=(16, 128, 128))


def size(tensors) -> int:
    return sum(tensor.nbytes for tensor in {id(t): t for t in tensors}.values())


@pytest.mark.slow
def test_the_weights_of_an_e_step_are_little_more_than_the_base(flux):
    settings = config(adapter_rank=64, precision="bfloat16", t_star=0.9, fuse=False)
    prepared = networks.prepare(flux, settings, None, None)
    held = [p for network in prepared.three for p in network.parameters()]
    base = size(prepared.three[1].parameters())
    assert base > 22e9 and size(held) < 1.1 * base
    whole = networks.prepare(flux, dataclasses.replace(settings, adapter_rank=0), None, None)
    assert size(p for network in whole.three for p in network.parameters()) > 3 * base


@pytest.mark.slow
def test_the_plan_of_flux_fits_with_adapters_only(flux):
    three = flux, Generator(flux, 0.9), flux
    settings = config(adapter_rank=64, batch_size=16, parallel="fsdp", t_star=0.9)
    counts = ParameterCounts.of(*three, settings.adapter)
    assert 90e6 < counts.generator == counts.fake_score < 120e6 and counts.teacher > 11e9
    shared = plan(counts, settings, devices=8, reduced=True).chosen
    whole = plan(
        ParameterCounts.of(*three), dataclasses.replace(settings, adapter_rank=0), devices=8, reduced=True
    ).chosen
    assert shared.total < 40 * GIB and 100 * GIB < whole.total
    assert whole.memory["gathered"] == 3 * 2 * counts.teacher
    prepared = networks.prepare(flux, dataclasses.replace(settings, precision="bfloat16", fuse=False), None, None)
    held = size(p for network in prepared.three for p in network.parameters())
    assert plan(counts, settings, devices=1, reduced=True).chosen.memory["weights"] == pytest.approx(held, rel=1e-3)


@pytest.mark.slow
def test_a_checkpoint_of_a_base_of_12_billion_parameters_is_below_a_gigabyte(flux):
    prepared = networks.prepare(flux, config(adapter_rank=16, precision="bfloat16", t_star=0.9, fuse=False), None, None)
    generator, _, fake_score = prepared.three
    parts = {"generator": generator, "fake_score": fake_score, "ema": prepared.ema.module}
    weights = sum(
        tensor.nbytes for name, part in parts.items() for key, tensor in part.state_dict().items()
        if key in prepared.own[name]
    )  # fmt: skip
    moments = 2 * sum(p.nbytes for part in (generator, fake_score) for p in part.parameters() if p.requires_grad)
    assert 100e6 < weights + moments < 1e9
    # The table of the docs: seven numbers for each parameter of an adapter.
    sizes = {rank: 7 * 4 * adapters.count(flux, AdapterConfig(rank=rank)) for rank in (4, 8, 16, 32, 64, 128, 21, 22)}
    assert weights + moments == sizes[16] and sizes[21] < 1e9 < sizes[22]
    row = " | ".join(f"{sizes[rank] / 1e9:.2f}" for rank in (4, 8, 16, 32, 64, 128))
    page = (Path(__file__).resolve().parents[1] / "docs" / "distributed.md").read_text()
    assert f"| a checkpoint of Flux.1, GB | {row} |" in page, row
    assert f"Five are {sizes[64] * 5 / 7 / 1e9:.1f} GB at rank 64" in page
