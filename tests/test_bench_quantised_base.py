"""benchmarks.quantised_base: which weights are rounded, and the table of a run with adapters."""

import copy

import pytest
import torch
from helpers import seeded
from test_adapters import adapted
from test_trainer import digits_teacher

from benchmarks import quantised_base
from emd_fast.train.quantised_base import quantised

pytest.importorskip("peft")
pytest.importorskip("torchao")
LAYERS = {f"network.{name}" for name in ("embedding", "modulation", "attention.qkv", "attention.projection")}


def trainer(**changes):
    made = adapted(digits_teacher(), num_classes=3, **changes)
    for name, parameter in made.fake_score.named_parameters():
        if ".lora_B" in name:
            parameter.data = 0.02 * torch.randn(parameter.shape, generator=seeded(len(name)))
    return made


def test_the_table_has_the_error_of_delta_at_each_level():
    made = trainer()
    own = copy.deepcopy(made.teacher.state_dict())
    rows = quantised_base.delta_errors(made, 4, torch.tensor([0.1, 4.0]))
    assert [row["log-SNR"] for row in rows] == pytest.approx([4.605, -2.773], abs=1e-3)
    for row in rows:
        assert 0 < row["bf16 error"] < row["fp8 error"] < row["nf4 error"]
        assert 0 < row["int8 error"] < row["int8, teacher alone"]
    assert all(torch.equal(value, own[name]) for name, value in made.teacher.state_dict().items())


def test_the_rounded_weights_are_those_of_a_quantised_base():
    teacher = digits_teacher()
    found = quantised_base.weights_of(teacher)
    assert set(found) == {"bf16", "int8", "fp8", "nf4"}
    for name in ("int8", "fp8", "nf4"):
        made = quantised(teacher, name)
        assert all(torch.equal(weight, made.get_submodule(layer).weight) for layer, weight in found[name].items())
    assert set(found["int8"]) == set(found["bf16"]) == LAYERS
    denoiser = quantised_base.rounded(trainer().fake_score, found["int8"])
    layer = denoiser.get_submodule("network.modulation")
    assert torch.equal(layer.base_layer.weight, found["int8"]["network.modulation"]) and layer.lora_B


@pytest.mark.parametrize("changes", [{"adapter_rank": 0}, {"base_dtype": "int8"}, {"adapter_networks": ["generator"]}])
def test_a_run_without_adapters_on_a_base_as_it_came_is_refused(changes):
    with pytest.raises(ValueError, match="needs adapters on a base as it came"):
        quantised_base.delta_errors(adapted(digits_teacher(), num_classes=3, **changes), 4, torch.tensor([1.0]))
