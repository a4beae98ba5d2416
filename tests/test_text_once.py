"""Transformers with cross-attention project a prompt once in an E-step."""

import contextlib
import unittest.mock

import pytest
import torch
from helpers import FlopCount

pytest.importorskip("diffusers")

import architectures
from test_architectures import pipeline_of, trained

from emd_fast.teachers import diffusers as teachers

OF_TEXT = ("caption_projection.linear_1", "caption_projection.linear_2", "attn2.to_k", "attn2.to_v")


def operations_of_text(network, tokens):
    """Of the layers that see the text alone, for one prompt."""
    layers = [part for path, part in network.named_modules() if path.endswith(OF_TEXT)]
    assert len(layers) == 2 + 2 * 2
    return sum(2 * tokens * layer.weight.numel() for layer in layers)


def sampled(trainer, steps):
    trainer.posterior.steps = steps
    with FlopCount() as counted:
        posterior = trainer.sample_posterior()
    return posterior, counted.total


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["SanaTransformer2DModel", "PixArtTransformer2DModel"])
def test_an_e_step_projects_its_prompts_once(tmp_path, name, precision):
    row = architectures.ROWS[name]
    pipeline_of(row).save_pretrained(tmp_path / "teacher")
    trainer = trained(teachers.load(tmp_path / "teacher", **row.size), row, steps=0, precision=precision, t_star=0.5)
    (_, one), (_, two), (ours, three) = (sampled(trainer, steps) for steps in (1, 2, 3))
    with unittest.mock.patch("emd_fast.em.e_step.conditioning_cache", contextlib.nullcontext):
        (_, plain_two), (theirs, plain_three) = (sampled(trainer, steps) for steps in (2, 3))
    assert torch.equal(ours.drift, theirs.drift) and torch.equal(ours.z, theirs.z)
    assert three - two == two - one
    # Two samples pass the generator and the fake score, and twice the teacher, which is guided.
    rows = 2 * (1 + 1 + 2)
    tokens = row.cond(architectures.LENGTHS)["prompt_embeds"].shape[1]
    saved = rows * operations_of_text(trainer.teacher, tokens)
    assert (plain_three - plain_two) - (three - two) == saved
