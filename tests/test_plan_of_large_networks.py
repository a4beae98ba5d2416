"""The plan of published networks of 12 to 20 billion parameters with adapters of rank 64 on 8 devices of 80 GB."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_trainer import config
from torch.autograd.graph import saved_tensors_hooks

from emd_fast import Denoiser, distributed, schedules
from emd_fast.config import ConfigError
from emd_fast.run.plan import plan
from emd_fast.train import networks
from emd_fast.train.memory import GIB
from emd_fast.train.parameter_counts import ParameterCounts

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")

DEVICE = 80e9
TEXT = 512  # tokens
PAGE = Path(__file__).resolve().parents[1] / "docs" / "distributed.md"
BASE = {"attention_head_dim": 128, "num_attention_heads": 24}
LARGE = {  # class, what its published config.json has, one sample
    "Flux.1": ("FluxTransformer2DModel", {**BASE, "num_layers": 19, "guidance_embeds": True}, (16, 128, 128)),
    "Qwen-Image": (
        "QwenImageTransformer2DModel",
        {**BASE, "num_layers": 60, "joint_attention_dim": 3584},
        (16, 128, 128),
    ),
    "Wan 2.1 14B": (
        "WanTransformer3DModel",
        {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40},
        (16, 21, 60, 104),
    ),
}
SETTINGS = {
    "adapter_rank": 64,
    "batch_size": 8,
    "parallel": "fsdp",
    "precision": "bfloat16",
    "activation_checkpointing": "all",
    "t_star": 0.9,
    "fuse": False,
}


class Attention(torch.autograd.Function):
    """What a fused kernel keeps: queries, keys, values, result and one number for each row."""

    @staticmethod
    def forward(ctx, query, key, value):
        result = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, result, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return result


def kept(generator, x, cond) -> tuple[float, float, float, float]:
    """Bytes that a pass keeps for its backward pass.

    Outside of blocks, inputs of blocks, the most of one block; and all, where nothing is recomputed.
    """
    blocks = distributed.blocks_of(generator)
    found, inside, alive = [{}, {}], [{} for _ in blocks], []
    current = [found[0]]

    def note(tensor, table=None):
        storage = tensor.untyped_storage()
        (current[-1] if table is None else table)[storage._cdata] = storage.nbytes()
        alive.append(tensor)
        return tensor

    def before(block, given, named, table):
        for value in (*given, *named.values()):
            if isinstance(value, torch.Tensor):
                note(value, found[1])
        current.append(table)

    for block, table in zip(blocks, inside, strict=True):
        block.register_forward_pre_hook(lambda *a, table=table: before(*a, table), with_kwargs=True)
        block.register_forward_hook(lambda *_: current.pop() and None)
    with saved_tensors_hooks(note, lambda x: x):
        alive.append(generator(x, cond))
    parts = [sum(table.values()) for table in (*found, max(inside, key=lambda table: sum(table.values())))]
    return *parts, sum({key: size for table in (found[0], *inside) for key, size in table.items()}.values())


@pytest.fixture(scope="module", params=LARGE)
def large(request):
    """Name, teacher on the meta device, bytes of one sample in a pass: with recomputed blocks, without."""
    from emd_fast.teachers.diffusers import architectures

    kind, form, shape = LARGE[request.param]
    with torch.device("meta"):
        network = architectures.network(getattr(diffusers, kind)(**form))
    teacher = Denoiser(network, schedules.RectifiedFlow(), "flow", sample_shape=shape)
    generator = networks.prepare(teacher, config(**SETTINGS), None, None).three[0]
    generator.denoiser.weights_dtype = None  # there is no autocast on this device
    for parameter in generator.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    by_batch = []
    fused = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda query, key, value, *_, **named: Attention.apply(query, key, value)
    try:
        for batch in (1, 2):
            with torch.device("meta"):
                rows = {
                    name: [TEXT if n == "tokens" else n for n in row] for name, row in network.takes.tensors.items()
                }
                cond = {
                    name: torch.ones(batch, *row, dtype=torch.bool if name == "prompt_mask" else torch.bfloat16)
                    for name, row in rows.items()
                }
                cond = cond if len(cond) > 1 else next(iter(cond.values()))
                by_batch.append(kept(generator, torch.empty(batch, *shape), cond))
    finally:
        F.scaled_dot_product_attention = fused
    *parts, every = (two - one for one, two in zip(*by_batch, strict=True))
    return request.param, teacher, sum(parts), every


def planned(teacher, activations, room=DEVICE, **changes):
    settings = config(**{**SETTINGS, **changes})
    counts = ParameterCounts.of(teacher, teacher, teacher, settings.adapter)
    return plan(counts, settings, devices=8, reduced=True, activations=activations, available=room)


@pytest.mark.slow
@pytest.mark.first
def test_adapters_of_rank_64_fit_on_8_devices_of_80_gb(large):
    name, teacher, activations, every = large
    made = planned(teacher, activations)
    made.check(DEVICE)
    assert set(made.chosen.gather.by.values()) == {"phase"} and "auto" in made.chosen.gather.reason
    rows = {line.partition("  ")[0]: line.split()[-2] for line in made.table().splitlines()[2:]}
    assert all(rows[f"{network} is gathered by"] == "phase" for network in made.chosen.gather.by)
    assert float(rows["activations"]) == pytest.approx(activations / GIB, abs=0.01)
    by_block = planned(teacher, activations, gather="block")
    away = planned(teacher, activations, gather="block", offload=["teacher"])
    assert away.chosen.host > 2.5 * GIB and "the host, for a device" in away.table()
    totals = [each.chosen.total / GIB for each in (made, by_block, away)]
    assert totals == sorted(totals, reverse=True)
    # What the docs say.
    cells = [made.chosen.memory["gathered"] / GIB, every / GIB, activations / GIB, *totals]
    assert f"| {name} | {' | '.join(f'{cell:.1f}' for cell in cells)} |" in PAGE.read_text(), (name, cells)


@pytest.mark.slow
def test_phase_that_cannot_fit_says_that_blocks_do(large):
    _, teacher, activations, _ = large
    room = planned(teacher, activations, gather="block").chosen.total + GIB
    with pytest.raises(ConfigError, match=r"with gather = 'phase' needs .*: try --gather block") as error:
        planned(teacher, activations, gather="phase").check(room)
    assert "\n" not in str(error.value)
    chosen = planned(teacher, activations, room=room / 0.9).chosen
    assert chosen.gather.by["teacher"] == "block" and chosen.total < room


@pytest.mark.slow
def test_the_command_line_plans_it_and_refuses_phase_on_a_small_device(call, tmp_path):
    kind, form, _ = LARGE["Flux.1"]
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": kind, **form}))
    words = ["plan", "--teacher", str(tmp_path), "--t-star=1", "--batch-size=8", "--devices=8", "--parallel=fsdp"]
    words += ["--precision=bfloat16", "--adapter-rank=64", "--activation-checkpointing=all", '--offload=["teacher"]']
    code, said, _ = call(*words, "--device-memory=74.5")
    assert code == 0 and "gather: auto: " in said and "teacher is gathered by" in said
    assert "the host, for a device" in said and 'activation_checkpointing = "all"' in said
    code, _, said = call(*words, "--device-memory=20", "--gather=phase")
    assert code == 2 and "try --gather block" in said and said.count("\n") == 1
    assert call(*words, "--device-memory=20")[0] == 0  # auto gathers by block
