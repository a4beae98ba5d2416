"""The networks of EDM and EDM2 against a plain formulation in float64, and against numbers of NVlabs' own code."""

import edm_files
import edm_plain
import pytest
import torch
from helpers import assert_as_good_as_eager, assert_within, naming

from emd_fast import use_backend
from emd_fast.teachers import edm
from emd_fast.teachers.edm_networks import DhariwalUNet, EDM2UNet, SongUNet
from emd_fast.teachers.edm_networks.arguments import DhariwalArguments, EDM2Arguments, SongArguments

PLAIN = {SongUNet: edm_plain.SongUNet, DhariwalUNet: edm_plain.DhariwalUNet, EDM2UNet: edm_plain.UNet}

# D(x_t; sigma) of NVlabs' own code (github.com/NVlabs/edm at 008a4e5, edm2 at 4bf8162, float32 on a CPU): channel 1,
# row 3, the first three columns of both samples. Their wrapper was built with the arguments of `edm_files.NETWORKS`
# (and `TINY`), its network filled by `edm_files.fill`, and called on `edm_files.image()` with one-hot labels.
NVLABS = {
    "ddpmpp": [0.1297985, 0.2742314, 0.2368879, -0.3310659, -0.4053727, -0.6776617],
    "ncsnpp": [0.1703735, 0.2739395, 0.2430517, -0.4862981, -0.7654713, -0.9404435],
    "skips": [0.04267061, 0.01261726, 0.02106839, -0.4387727, -0.6882809, -0.9510927],
    "residual_box": [0.04211846, 0.2427295, 0.09791259, -0.7333001, -0.7145355, -1.074732],
    "adm": [0.295412, 0.3534465, 0.4445564, 0.1814966, 0.1589094, -0.07440075],
    "vp": [0.3957702, 0.2016818, 0.3088165, 7.174829, 4.975258, 5.630373],
    "ve": [0.1357514, 0.367828, 0.3358824, -5.526301, -6.28539, -10.98041],
    "iddpm": [0.2185796, 0.3345321, 0.1923125, -0.787589, -6.675751, -7.349808],
    "edm2": [0.2606526, 0.2798302, 0.2601972, -0.004220892, -0.008626456, -0.07527346],
    "edm2_other": [0.2269265, 0.2389784, 0.2389753, 0.01376225, -0.01040404, -0.05439421],
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """name -> the Denoiser of that network's checkpoint."""
    folder, found = tmp_path_factory.mktemp("edm"), {}

    def of(name):
        if name not in found:
            path = folder / f"{name}.pkl"
            path.write_bytes(edm_files.file_of(name))
            found[name] = edm.load(path)
        return found[name]

    return of


@pytest.mark.parametrize("name", edm_files.NETWORKS)
def test_it_gives_the_numbers_of_nvlabs(name, loaded):
    denoiser = loaded(name)
    x, sigma, labels = edm_files.image()
    found = denoiser.denoise(x, sigma, labels if denoiser.null_cond else None)[:, 1, 3, :3].flatten()
    expected = torch.tensor(NVLABS[name])
    assert_within(found, expected, 1e-5 * max(1.0, expected.abs().max().item()), name)


def plain_copy(network, arguments):
    """The plain formulation of a network, with its weights; called with one-hot labels."""
    made = PLAIN[type(network)](**arguments)
    lacking, more = made.load_state_dict(network.state_dict(), strict=False)
    assert not lacking and all(key.startswith("map_augment") or key.endswith("resample_filter") for key in more)
    return made.eval()


@pytest.mark.parametrize("name", edm_files.NETWORKS)
def test_outputs_and_gradients_are_those_of_a_plain_formulation(name, loaded):
    network, arguments = loaded(name).network, {**edm_files.TINY, **edm_files.NETWORKS[name][2]}
    x, _, labels = edm_files.image(3)
    x, c_noise = x / x.abs().amax((1, 2, 3), keepdim=True), torch.tensor([-0.4, 0.7, 1.1])
    labels = labels if loaded(name).null_cond else None
    reference = plain_copy(network, arguments)
    v = torch.randn(3, arguments["out_channels"], 8, 8, generator=torch.Generator().manual_seed(1))

    def run(network, dtype, labels):
        """The output, and gradients to the input and to every parameter, by name."""
        network, inputs = network.to(dtype), {"x": x.to(dtype).requires_grad_()}
        inputs |= {key: p for key, p in network.named_parameters() if not key.startswith("map_augment")}
        y = network(inputs["x"], c_noise.to(dtype), labels)
        return y, dict(zip(inputs, torch.autograd.grad((y * v.to(dtype)).sum(), list(inputs.values())), strict=True))

    y, gradients = run(network, torch.float32, labels)
    hot = None if labels is None else torch.nn.functional.one_hot(labels, arguments["label_dim"]).double()
    eager, eager_gradients = run(reference, torch.float32, None if hot is None else hot.float())
    exact, exact_gradients = run(reference, torch.float64, hot)
    assert gradients.keys() == exact_gradients.keys()
    assert_within(y, exact, 1e-5, name)
    assert_as_good_as_eager(y, exact, eager, what=name)
    errors = []
    for key, mine in gradients.items():
        right, its = exact_gradients[key], eager_gradients[key]
        scale = max(1.0, right.abs().max().item())
        assert_within(mine / scale, right / scale, 1e-5, f"{name}: gradient of {key}")
        errors.append(torch.stack([(g.double() - right).flatten() / scale for g in (mine, its)]))
    # Over the whole gradient: whether eager PyTorch is right in one small tensor is luck, which the processor decides.
    ours, eagers = torch.cat(errors, dim=1).square().mean(1).sqrt().tolist()
    assert ours <= 2 * eagers, f"{name}: RMS error {ours:.3g}, eager {eagers:.3g}"


@pytest.mark.parametrize("name", ["ddpmpp", "edm2"])
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_bfloat16_is_close(name, backend, loaded):
    denoiser = loaded(name)
    x, sigma, labels = edm_files.image()
    expected = denoiser(x, sigma, labels)
    with use_backend(backend), torch.autocast("cpu", torch.bfloat16):
        found = denoiser(x, sigma, labels)
    # Eight bits through some twenty layers; a wrong layer is off by the size of the output itself.
    assert ((found.float() - expected).square().mean() / expected.square().mean()).sqrt() < 0.05


@pytest.mark.parametrize("name", ["ncsnpp", "adm", "edm2"])
def test_it_compiles_to_one_graph(name, loaded):
    denoiser = loaded(name)
    x, sigma, labels = edm_files.image()
    labels = labels if denoiser.null_cond else None
    with torch.no_grad(), use_backend("reference"):  # where eager convolutions are PyTorch's, as compiled ones are
        compiled = torch.compile(denoiser.network, fullgraph=True, backend="eager")(x, sigma, labels)
        assert_within(compiled, denoiser.network(x, sigma, labels), 1e-6)


def test_labels(loaded):
    denoiser = loaded("ddpmpp")
    x, sigma, labels = edm_files.image()
    none = denoiser(x, sigma, None)
    assert torch.equal(none, denoiser(x, sigma, torch.full_like(labels, denoiser.null_cond)))
    assert not torch.allclose(none, denoiser(x, sigma, labels), atol=1e-3)
    guided = denoiser.guided(x, sigma, labels, 2.0)
    assert_within(guided, 2 * denoiser(x, sigma, labels) - none, 1e-5)
    for error, wrong in ((ValueError, labels + 5), (ValueError, labels[:1]), (TypeError, labels.float())):
        with pytest.raises(error, match=naming("labels")):
            denoiser(x, sigma, wrong)
    with pytest.raises(ValueError, match="no classes"):
        loaded("vp")(x, sigma, labels)


def test_edm2_normalises_its_weights_when_it_trains():
    _, network, _ = edm_files.network_of("edm2")
    x, _, labels = edm_files.image()
    c_noise = torch.tensor([0.1, -0.5])
    before = {name: value.clone() for name, value in network.state_dict().items()}
    evaluated = network(x, c_noise, labels)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    trained = network.train()(x, c_noise, labels)
    # The 1e-4 beside each norm counts once more in every layer.
    tolerance = 5e-3 * evaluated.abs().max().item()
    assert_within(trained, evaluated, tolerance)
    trained.square().mean().backward()
    for name, parameter in ((name, p) for name, p in network.named_parameters() if p.dim() > 1):
        rms = parameter.detach().square().mean(tuple(range(1, parameter.dim()))).sqrt()
        assert_within(rms, torch.ones_like(rms), 5e-3, name)
        # The output does not depend on the length of a filter, so its gradient is at right angles to it.
        inner = (parameter.grad * parameter.detach()).flatten(1).sum(1)
        size = parameter.grad.flatten(1).norm(dim=1) * parameter.detach().flatten(1).norm(dim=1)
        assert (inner.abs() <= 2e-3 * size + 1e-7).all(), name
    with torch.no_grad():
        assert_within(network.eval()(x, c_noise, labels), trained, tolerance)


@pytest.mark.parametrize(
    "network, arguments, parameters",
    [
        (SongUNet, SongArguments(32, 3, 3, 10, augment_dim=9, channel_mult=[2, 2, 2]), 55.7),  # CIFAR-10, table 7
        (SongUNet, SongArguments(64, 3, 3, augment_dim=9), 61.8),  # FFHQ and AFHQ
        (DhariwalUNet, DhariwalArguments(64, 3, 3, 1000), 295.9),
        (EDM2UNet, EDM2Arguments(64, 4, 4, 1000, model_channels=128), 124.7),  # XS
        (EDM2UNet, EDM2Arguments(64, 3, 3, 1000), 280.2),  # S
    ],
)
def test_the_published_sizes(network, arguments, parameters):
    with torch.device("meta"):
        made = network(arguments)
    assert sum(p.numel() for p in made.parameters()) / 1e6 == pytest.approx(parameters, abs=0.06)


def test_wide_heads_of_attention():
    """More channels a head than emd_fast.ops.attention takes: one head of 288, as a wide SongUNet has it."""
    arguments = SongArguments(8, 3, 3, model_channels=32, channel_mult=[1, 9], num_blocks=1, attn_resolutions=[4])
    network, x, t = edm_files.fill(SongUNet(arguments)).eval(), edm_files.image()[0], torch.tensor([0.1, 0.2])
    with torch.no_grad():
        expected = plain_copy(network, vars(arguments)).double()(x.double(), t.double())
        assert_within(network(x, t), expected, 1e-5)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("img_resolution", [0, 9]), ("model_channels", [10**9, "128"]), ("channel_mult", [[], [1] * 40, [0]]),
        ("num_blocks", [10**6]), ("label_dim", [-1]), ("resample_filter", [[1, 2, 1], [1, -1]]),
        ("encoder_type", ["other"]), ("in_channels", [True]),
    ],
)  # fmt: skip
def test_arguments_out_of_range(name, wrong):
    for value in wrong:
        with pytest.raises(ValueError, match=naming(name)):
            SongArguments(**{**edm_files.TINY, name: value})
