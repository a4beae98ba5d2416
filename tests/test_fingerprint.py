"""One line for the weights of a network: the same for the same weights, however they lie, and no other."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import FAMILIES, OWN, make
from torch import nn

import emd_fast
from emd_fast.train.fingerprint import fingerprint


@pytest.mark.parametrize("name", [*FAMILIES, *OWN])
def test_fused_and_compiled_networks_have_the_weights_that_they_had(name):
    network, _, _ = make(name)
    plain = fingerprint(network)
    assert plain == fingerprint(copy.deepcopy(network)) == fingerprint(emd_fast.fuse(network, compile=True))
    assert fingerprint(torch.compile(network)) == plain


def test_memory_layout_does_not_count_and_everything_else_does():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    seen = {fingerprint(network)}
    assert fingerprint(copy.deepcopy(network).to(memory_format=torch.channels_last)) in seen
    others = [copy.deepcopy(network) for _ in range(6)]
    others[0][0].weight.data.view(torch.int32)[3, 2, 2, 2] ^= 1  # the last bit of the last number
    others[1][1].num_batches_tracked += 1  # a buffer
    others[2].to(torch.bfloat16)
    others[3][1].weight, others[3][1].bias = others[3][1].bias, others[3][1].weight
    others[4][1].weight.data = others[4][1].weight.data[:, None]
    others[5].register_buffer("more", torch.zeros(0))
    for other in others:
        assert fingerprint(other) not in seen
        seen.add(fingerprint(other))


def test_what_has_no_values_counts_by_its_shape():
    with torch.device("meta"):
        small, same, large = nn.Linear(2, 3), nn.Linear(2, 3), nn.Linear(2, 4)
    assert fingerprint(small) == fingerprint(same) != fingerprint(large)
