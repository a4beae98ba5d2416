"""fuse(): the same numbers, parameters and keys; what it refuses; how it is copied, saved and undone."""

import copy
import functools
import importlib
from pathlib import Path

import edm_plain
import pytest
import torch
from helpers import assert_all_same, assert_same, assert_within, randomised, seeded
from kernel_cases import doubled
from networks import FAMILIES, OWN, make, output, unet2d_condition

import emd_fast
from emd_fast import ops
from emd_fast.fusion.published import fingerprint


def gradients(network, x, arguments):
    """The output, and the gradients of a random linear form of it: to the input, then to every parameter."""
    x = x.detach().clone().requires_grad_()
    out = output(network, x, arguments)
    cotangent = torch.randn(out.shape, generator=seeded(9)).to(out.dtype)
    return out, torch.autograd.grad(out, [x, *network.parameters()], cotangent, allow_unused=True)


def relative(mine, exact):
    return ((mine.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-12)).item()


def assert_close(found, expected):
    """Outputs, and gradients as a whole."""
    assert relative(found[0], expected[0]) < 1e-5
    assert relative(*(torch.cat([g.flatten() for g in each[1] if g is not None]) for each in (found, expected))) < 1e-5


NAMES = [*FAMILIES, *OWN]


@pytest.mark.parametrize("name", NAMES)
def test_float32_outputs_and_gradients(backend, name):
    network, x, arguments = make(name)
    exact = gradients(copy.deepcopy(network).double(), x.double(), tuple(doubled(a) for a in arguments))[1]
    original, its = expected = gradients(network, x, arguments)
    addresses = {key: value.data_ptr() for key, value in network.state_dict().items()}
    named = {key: id(value) for key, value in network.named_parameters()}
    kind = type(network)
    assert emd_fast.fuse(network) is network
    assert isinstance(network, kind) and type(network).__name__ == kind.__name__
    actual, mine = found = gradients(network, x, arguments)
    assert_close(found, expected)
    assert actual.dtype == original.dtype == torch.float32 and relative(mine[0], its[0]) < 1e-5
    size = torch.cat([g.flatten() for g in its if g is not None]).norm().item()
    for key, a, b, e in zip(["x", *named], mine, its, exact, strict=True):
        assert (a is None) == (b is None), key
        if a is not None:  # some gradients are small sums of large terms, of which float32 itself keeps fewer digits
            error, own = (torch.linalg.vector_norm(g.double() - e).item() for g in (a, b))
            assert error <= max(1e-5 * e.norm().item(), 2 * own + 1e-7 * size), (key, error, own, e.norm().item())
    assert addresses == {key: value.data_ptr() for key, value in network.state_dict().items()}
    assert named == {key: id(value) for key, value in network.named_parameters()}
    assert emd_fast.fusion_report(network).fused


@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_no_worse_than_the_original(backend, name, how):
    """Error against float32 at most 1.5 times the original's own, output and gradient to the input."""
    network, x, arguments = make(name)
    exact = gradients(network, x, arguments)
    if how == "bfloat16":
        network, x = network.bfloat16(), x.bfloat16()
        arguments = tuple(a.bfloat16() if a.dim() == 3 else a for a in arguments)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        original, fused = gradients(network, x, arguments), gradients(emd_fast.fuse(network), x, arguments)
    for mine, its, right in zip(*((out, grads[0]) for out, grads in (fused, original, exact)), strict=True):
        assert mine.dtype == its.dtype and relative(mine, right) <= 1.5 * relative(its, right)


@pytest.mark.parametrize("name", NAMES)
def test_float64_goes_through(name):
    network, x, arguments = make(name)
    network, arguments = network.double(), tuple(doubled(a) for a in arguments)
    expected = output(network, x.double(), arguments)
    assert relative(output(emd_fast.fuse(network), x.double(), arguments), expected) < 1e-6


@pytest.mark.parametrize("name", ["unet2d", "edm2", "own edm2"])
def test_in_training_mode(name):
    network, x, arguments = make(name)
    before = {key: value.clone() for key, value in network.train().state_dict().items()}
    other = emd_fast.fuse(copy.deepcopy(network))
    assert all(module.training for module in other.modules())
    assert_all_same(other.state_dict().values(), before.values())
    with torch.no_grad():
        assert relative(output(other, x, arguments), output(network, x, arguments)) < 1e-5
    assert_all_same(other.state_dict().values(), network.state_dict().values())


def state_of(network, addresses=True):
    """All that unfuse() is to give back."""
    modules = [
        (key, type(m), id(m), sorted(vars(m)), id(vars(m).get("processor"))) for key, m in network.named_modules()
    ]
    return modules, [(key, id(p), p.stride(), addresses and p.data_ptr()) for key, p in network.named_parameters()]


@pytest.mark.parametrize("options", [{}, {"compile": True, "memory_format": torch.channels_last}])
@pytest.mark.parametrize("name", NAMES)
def test_unfuse_gives_everything_back(name, options):
    network, x, arguments = make(name)
    before, expected = state_of(network, not options), output(network, x, arguments)
    emd_fast.fuse(network, **options)
    assert state_of(network, not options) != before
    if options:
        assert all(p.is_contiguous(memory_format=torch.channels_last) for p in network.parameters() if p.dim() == 4)
    assert emd_fast.unfuse(network) is network
    assert state_of(network, not options) == before
    assert_same(output(network, x, arguments), expected)
    assert not emd_fast.fusion_report(network).fused


@pytest.mark.parametrize("memory_format", ["auto", torch.channels_last, None])
@pytest.mark.parametrize("how", ["args", "kwargs"])
def test_images_are_given_in_the_memory_format(memory_format, how):
    expected = torch.channels_last if memory_format else torch.contiguous_format
    network, x, arguments = make("unet2d")
    emd_fast.fuse(network, memory_format=memory_format)
    seen = []
    network.conv_in.register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    network(x, *arguments) if how == "args" else network(sample=x, timestep=arguments[0])
    assert seen[0].is_contiguous(memory_format=expected) and torch.equal(seen[0], x)
    assert emd_fast.unfuse(network).conv_in and x.is_contiguous()


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("name", ["unet2d_condition", "song", "edm2", "own adm", "own edm2"])
def test_copies_are_fused_and_independent(name, how, tmp_path):
    network, x, arguments = make(name)
    emd_fast.fuse(network, memory_format=torch.channels_last)
    expected = output(network, x, arguments)
    torch.save(network, tmp_path / "network.pt")
    other = copy.deepcopy(network) if how == "deepcopy" else torch.load(tmp_path / "network.pt", weights_only=False)
    assert emd_fast.fusion_report(other) == emd_fast.fusion_report(network)
    assert_same(output(other, x, arguments), expected)
    with torch.no_grad():
        for p in network.parameters():
            p.zero_()
    assert_same(output(other, x, arguments), expected)
    emd_fast.unfuse(other)
    assert emd_fast.fusion_report(network).fused
    assert relative(output(other, x, arguments), expected) < 1e-5


def test_attention_masks_go_to_the_processor_before():
    network, x, arguments = make("unet2d_condition")
    masks = {"encoder_attention_mask": torch.arange(77).expand(3, -1) < 40}
    with torch.no_grad():
        plain, expected = network(x, *arguments).sample, network(x, *arguments, **masks).sample
        actual = emd_fast.fuse(network)(x, *arguments, **masks).sample
    assert not torch.allclose(plain, expected)
    assert relative(actual, expected) < 1e-5


def test_a_processor_set_later_serves():
    from diffusers.models.attention_processor import AttnProcessor

    network, x, arguments = make("unet2d_condition")
    expected = output(emd_fast.fuse(network), x, arguments)
    network.set_attn_processor(AttnProcessor())
    assert relative(output(network, x, arguments), expected) < 1e-5
    assert [part.name for part in emd_fast.fusion_report(network).left] == ["Attention"] * 8
    assert emd_fast.fusion_report(emd_fast.unfuse(network)).fused == ()


def test_the_trainer_copies_a_fused_teacher():
    from emd_fast import Denoiser, EMDConfig, EMDTrainer
    from emd_fast.diffusion.schedules import EDM

    results = []
    for fused in (False, True):
        denoiser = Denoiser(make("small")[0], EDM(), "edm", sigma_data=0.5, sample_shape=(3, 8, 8))
        denoiser = emd_fast.fuse(denoiser) if fused else denoiser
        trainer = EMDTrainer(denoiser, EMDConfig(steps=2, batch_size=4, num_classes=10, seed=1, fuse=False))
        for net in (trainer.generator, trainer.fake_score, trainer.ema.module):
            assert bool(emd_fast.fusion_report(net).fused) == fused
        metrics = [trainer.step() for _ in range(2)]
        results.append((trainer.generate(4), metrics))
    assert relative(results[1][0], results[0][0]) < 1e-4
    for mine, its in zip(results[1][1], results[0][1], strict=True):
        for key in its:
            assert_within(mine[key], its[key], 1e-3 * (1e-6 + its[key].abs()), key)


def test_a_fused_network_is_returned_as_it_is():
    network, *_ = make("small")
    emd_fast.fuse(network)
    before = state_of(network)
    assert emd_fast.fuse(network, compile=True, memory_format=torch.channels_last) is network
    assert state_of(network) == before


def test_one_line_is_logged(caplog):
    with caplog.at_level("INFO", "emd_fast"):
        emd_fast.fuse(make("unet2d")[0])
    assert len(caplog.records) == 1 and caplog.records[0].name == "emd_fast"
    for word in ("UNet2DModel", "8 ResnetBlock2D", "4 Attention", "21 GroupNorm"):
        assert word in caplog.text


def test_nothing_to_fuse():
    network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())
    before = state_of(network)
    with pytest.warns(UserWarning, match="nothing to fuse in Sequential.*UNet2DConditionModel.*GroupNorm"):
        assert emd_fast.fuse(network) is network
    with pytest.raises(ValueError, match="nothing to fuse"):
        emd_fast.fuse(network, strict=True)
    assert state_of(network) == before


class Somebodys(torch.nn.Module):
    """A network that nobody knows."""

    def __init__(self):
        super().__init__()
        nn, act = torch.nn, torch.nn.SiLU()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.GroupNorm(4, 8))
        self.shared = nn.Sequential(nn.GroupNorm(2, 8), act, nn.Conv2d(8, 8, 1), act)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(8, 8, 1), nn.GELU()) for _ in range(3))

    def forward(self, x):
        x = self.shared(self.first(x))
        for block in self.blocks:
            x = x + block(x)
        tokens = x.flatten(2).transpose(1, 2)
        return x + self.attention(tokens, tokens, tokens)[0].transpose(1, 2).reshape(x.shape)


def test_the_known_parts_of_any_network():
    network, x = Somebodys(), torch.randn(2, 3, 4, 4)
    before = state_of(network)
    expected = gradients(network, x, ())
    with pytest.raises(ValueError, match=r"attention \(MultiheadAttention\): attention of a kind"):
        emd_fast.fuse(network, strict=True)
    assert state_of(network) == before
    assert_close(gradients(emd_fast.fuse(network), x, ()), expected)
    report = emd_fast.fusion_report(network)
    assert [part.path for part in report.fused] == ["first.1", "first.2", "first.3", "shared.0"]
    assert [(part.path, part.name) for part in report.left] == [("attention", "MultiheadAttention")]
    for text in ("Somebodys", "3 GroupNorm (first.1 and 2 more)", "1 MultiheadAttention (attention)"):
        assert text in str(report)


METHOD = "its forward, or another method"
RESNET, ATTENTION = "mid_block.resnets.0", "mid_block.attentions.0"


def of_kind(module, **members):
    module.__class__ = type("Mine", (type(module),), members)


@pytest.mark.parametrize(
    ("path", "reason", "change"),
    [
        ("", METHOD, lambda net: setattr(net, "forward", functools.partial(type(net).forward, net))),
        (RESNET, METHOD, lambda block: of_kind(block, forward=lambda self, x, temb: 2 * x)),
        (RESNET, "attributes that are not known: residual_scale", lambda block: setattr(block, "residual_scale", 2.0)),
        (
            ATTENTION, "attention of a kind that is not known",
            lambda block: of_kind(block, prepare_attention_mask=lambda self, mask, *_: mask),
        ),
        ("a subclass", METHOD, "Other"),
        ("a subclass of the same name", METHOD, "UNetBlock"),
        ("a forward on the instance", METHOD, None),
    ],
)  # fmt: skip
def test_what_is_not_the_known_class_is_left(path, reason, change):
    if callable(change):
        network, x, arguments = make("unet2d")
        change(network.get_submodule(path))
    else:
        path, x, arguments, kind = "", torch.randn(2, 16, 4, 4), [torch.randn(2, 8)], edm_plain.UNetBlock
        twice = lambda self, x, emb: 2 * edm_plain.UNetBlock.forward(self, x, emb)  # noqa: E731
        network = (type(change, (kind,), {"forward": twice}) if change else kind)(16, 16, 8)
        if change is None:
            network.forward = functools.partial(twice, network)
    before, expected = state_of(network), output(network, x, arguments)
    with pytest.raises(ValueError, match=reason):
        emd_fast.fuse(network, strict=True)
    assert state_of(network) == before
    emd_fast.fuse(network)
    assert relative(output(network, x, arguments), expected) < 1e-5
    assert reason in {part.path: part.note for part in emd_fast.fusion_report(network).left}[path]
    assert state_of(emd_fast.unfuse(network)) == before


@pytest.mark.parametrize("name", ["forward", "a function that it calls"])
def test_a_class_that_is_changed_is_not_the_published_one(name, tmp_path, monkeypatch):
    text = Path(edm_plain.__file__).read_text().partition("\n\n# Their source")[0]
    line, call = "y = self.conv_res0(mp_silu(x))", "return F.silu(x) / 0.596"
    assert line in text and call in text
    changed = {
        "comment": text.replace(line, f"{line}  # here"),
        "forward": text.replace(line, "y = self.conv_res0(mp_silu(2 * x))"),
        "a function that it calls": text.replace(call, "return F.silu(x) / 0.6"),
    }
    monkeypatch.syspath_prepend(tmp_path)
    found = []
    for how in ("comment", name):
        module = f"changed_{len(found)}_{len(name)}"
        (tmp_path / f"{module}.py").write_text(changed[how])
        found.append(fingerprint(block := importlib.import_module(module).Block))
    with pytest.raises(ValueError, match="its source is not that of the Block that NVlabs publishes"):
        emd_fast.fuse(block(16, 16, 8), strict=True)
    assert found[0] == fingerprint(edm_plain.Block) != found[1]
    monkeypatch.setattr(edm_plain.Block, "forward", lambda self, x, emb: x)
    assert fingerprint(edm_plain.Block) is None


def one_wide_head(attention):
    attention.heads, attention.inner_dim, attention.inner_kv_dim = 1, 512, 512


@pytest.mark.parametrize(
    ("name", "path", "change", "message"),
    [
        (
            "unet2d", "up_blocks.0.resnets.0.norm2", lambda norm: setattr(norm, "num_groups", 5),
            "up_blocks.0.resnets.0.norm2: num_groups must divide the channels: got 5 for 32",
        ),
        (
            "song", "enc.8x8_block0.norm1", lambda norm: setattr(norm, "num_groups", 3),
            "enc.8x8_block0.norm1: num_groups must divide the channels: got 3 for 16",
        ),
        ("unet2d", "conv_out", lambda layer: layer.to("meta"), "parameters must be on one device, got cpu, meta"),
        (
            "unet2d", ATTENTION, one_wide_head,
            f"{ATTENTION}: attention has a head_dim of 512, and ops.attention takes at most 256",
        ),
        ("head_dim of EDM", "", lambda network: None, "head_dim of 260"),
    ],
)  # fmt: skip
def test_bad_networks_raise_before_anything_changes(name, path, change, message):
    wide = torch.nn.Sequential(edm_plain.UNetBlock(260, 260, 8, attention=True))
    network = wide if "head_dim" in name else make(name)[0]
    change(network.get_submodule(path))
    before = state_of(network)
    with pytest.raises(ValueError, match=message):
        emd_fast.fuse(network)
    assert state_of(network) == before


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"network must be an nn.Module, got str"):
        emd_fast.fuse("unet")
    for option, value in (("memory_format", "nhwc"), ("compile", "yes")):
        with pytest.raises(TypeError, match=f"{option} must be"):
            emd_fast.fuse(torch.nn.GroupNorm(1, 2), **{option: value})


def test_what_is_left_in_a_diffusers_network():
    from diffusers.models.attention_processor import SlicedAttnProcessor

    network, x, arguments = make("unet2d")
    network.mid_block.resnets[0].nonlinearity = torch.nn.GELU()
    network.mid_block.attentions[0].set_processor(SlicedAttnProcessor(1))
    expected = output(network, x, arguments)
    assert relative(output(emd_fast.fuse(network), x, arguments), expected) < 1e-5
    notes = {part.path: part.note for part in emd_fast.fusion_report(network).left}
    own = "its processor is SlicedAttnProcessor, which computes something of its own"
    assert notes == {RESNET: "its activation is GELU, not SiLU", ATTENTION: own}


@pytest.mark.parametrize("linear", [False, True])
def test_channels_last_stays(linear):
    network, x, arguments = make("unet2d_condition")
    network = unet2d_condition(use_linear_projection=True).eval() if linear else network
    expected = output(network, x, arguments)
    emd_fast.fuse(network, memory_format=torch.channels_last)
    seen = []
    for path, module in network.named_modules():
        if path.endswith(("conv1", "conv2", "norm1", "norm2", "norm", "proj_in", "proj_out", "conv_norm_out")):
            module.register_forward_pre_hook(lambda m, args, path=path: seen.append((path, args[0])))
    actual = output(network, x.contiguous(memory_format=torch.channels_last), arguments)
    assert relative(actual, expected) < 1e-5
    images = [(path, value) for path, value in seen if value.dim() == 4]
    others = [path for path, value in images if not value.is_contiguous(memory_format=torch.channels_last)]
    assert len(images) > 20 and not others


def transformer(name):
    """A transformer of diffusers, and what it makes of an image."""
    import diffusers

    x, t = torch.randn(2, 4, 8, 8, generator=seeded(1)), torch.tensor([1, 500])
    common = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2}
    if name == "dit":
        network = diffusers.DiTTransformer2DModel(**common, sample_size=8, num_embeds_ada_norm=10, norm_num_groups=4)
        conditions = {"class_labels": torch.tensor([2, 3])}
    else:
        network = diffusers.SD3Transformer2DModel(
            **common, sample_size=8, patch_size=2, joint_attention_dim=16, caption_projection_dim=16,
            pooled_projection_dim=16, pos_embed_max_size=16, qk_norm="rms_norm" if name == "sd3.5" else None,
        )  # fmt: skip
        text = torch.randn(2, 7, 16, generator=seeded(2))
        conditions = {"encoder_hidden_states": text, "pooled_projections": text[:, 0]}
    return randomised(network, 0).eval(), lambda net: net(x, timestep=t, **conditions).sample


@pytest.mark.parametrize("options", [{}, {"compile": {"backend": "eager"}}])
@pytest.mark.parametrize("name", ["dit", "sd3", "sd3.5"])
def test_transformers_get_their_attention(name, options):
    network, run = transformer(name)
    before, expected = state_of(network), run(network)
    emd_fast.fuse(network, strict=True, **options)
    torch.manual_seed(0)
    results = [run(net) for net in (network, copy.deepcopy(network))]
    assert all(relative(result, expected) < 1e-5 for result in results)
    fused = [part.name for part in emd_fast.fusion_report(network).fused]
    assert fused.count("Attention") == 2 and len(fused) == (4 if options else 2)
    assert not emd_fast.fusion_report(network).left
    assert state_of(emd_fast.unfuse(network)) == before


def test_attention_goes_through_the_op(monkeypatch):
    seen, own = [], ops.attention
    monkeypatch.setattr(ops, "attention", lambda q, k, v, **rest: seen.append(q.shape[2:]) or own(q, k, v, **rest))
    counts = {"unet2d": 4, "unet2d_condition": 8, "song": 3, "edm2": 4, "small": 1, "own adm": 4, "dit": 2, "sd3": 2}
    for name, count in counts.items():
        network, *rest = transformer(name) if name in ("dit", "sd3") else make(name)
        seen.clear()
        rest[0](emd_fast.fuse(network)) if callable(rest[0]) else output(emd_fast.fuse(network), *rest)
        assert len(seen) == count, name


def test_layers_that_are_wrapped_in_a_known_block():
    class Wrapped(torch.nn.ModuleList):
        def forward(self, *args, **kwargs):
            return 1.5 * self[0](*args, **kwargs)

    network, x, arguments = make("song")
    for block in (*network.enc.values(), *network.dec.values()):
        for name in {"affine", "proj", "qkv"} & block._modules.keys():
            setattr(block, name, Wrapped([getattr(block, name)]))
    expected = output(network, x, arguments)
    assert relative(output(emd_fast.fuse(network, strict=True), x, arguments), expected) < 1e-5
