"""benchmarks.fp8: which products are rounded, to which numbers, and the table of a run."""

import pytest
import torch
from helpers import randomised
from torch import nn

import emd_fast
from benchmarks import fp8
from emd_fast.em.score_difference import ScoreDifference
from emd_fast.tasks import image_teacher
from emd_fast.tasks.digits_data import DIGITS

# Every finite positive number of e4m3: 4 bits of exponent (bias 7), 3 of mantissa, 448 is the largest.
NUMBERS = torch.tensor(
    sorted([m * 2.0**-9 for m in range(8)] + [(8 + m) * 2.0 ** (e - 3) for e in range(-6, 9) for m in range(8)])[:-1],
    dtype=torch.float64,
)


def nearest(x, dims):
    """Rounds to the nearest of NUMBERS by search, with the scale of the docs."""
    largest = x.abs().amax() if dims is None else x.abs().amax(dims, keepdim=True)
    scaled = (x * (448 / largest)).abs()
    return x.sign() * NUMBERS[(scaled[..., None] - NUMBERS).abs().argmin(-1)] * largest / 448


@pytest.fixture
def x():
    return torch.randn(4, 6, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_e4m3_is_the_nearest_number_of_the_format(x):
    assert len(NUMBERS) == 127 and NUMBERS[-1] == 448
    assert torch.equal(torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double(), NUMBERS)
    for dims in (None, (1, 2, 3)):
        torch.testing.assert_close(fp8.e4m3(x, dims), nearest(x, dims), rtol=1e-6, atol=1e-9)
    assert torch.equal(fp8.e4m3(torch.zeros(3), None), torch.zeros(3))


@torch.no_grad()
def test_3x3_convolutions_and_linear_layers_are_rounded_and_nothing_else(x):
    conv = randomised(nn.Conv2d(6, 8, 3, padding=1), 1).double()
    point = randomised(nn.Conv2d(6, 8, 1), 2).double()
    linears = [randomised(nn.Linear(5, 7, bias=bias), 3).double() for bias in (True, False)]
    plain = point(x)
    with fp8.RoundedOperands(fp8.e4m3) as mode:
        assert torch.equal(point(x), plain) and mode.rounded == 0
        found = conv(x), *(linear(x) for linear in linears)
    assert mode.rounded == 3
    rounded = nearest(x, None)
    weight = nearest(conv.weight, (1, 2, 3))
    torch.testing.assert_close(found[0], nn.functional.conv2d(rounded, weight, conv.bias, padding=1))
    for linear, y in zip(linears, found[1:], strict=True):
        torch.testing.assert_close(y, nn.functional.linear(rounded, nearest(linear.weight, (1,)), linear.bias))


def trainer(fuse):
    settings = emd_fast.config.load("digits", overrides={"emd.compute.fuse": fuse, "emd.batch_size": 8})
    teacher = randomised(image_teacher.untrained(settings.teacher, DIGITS), 4, 0.3)
    made = emd_fast.EMDTrainer(teacher, settings.emd)
    with torch.no_grad():
        for parameter in made.fake_score.parameters():
            parameter.mul_(1.05)
    return made


def test_the_table_has_the_error_of_delta_at_each_level():
    rows = fp8.delta_errors(trainer(fuse=False), 4, torch.tensor([0.1, 4.0]))
    assert [row["log-SNR"] for row in rows] == pytest.approx([4.605, -2.773], abs=1e-3)
    for row in rows:
        assert 0 < row["bf16 error"] < row["e4m3 error"] and row["e4m3 cosine"] < row["bf16 cosine"] <= 1


def test_a_fused_run_is_refused():
    with pytest.raises(ValueError, match="--fuse false"):
        fp8.delta_errors(trainer(fuse=True), 4, torch.tensor([1.0]))


def test_distil_rounds_the_score_passes(monkeypatch, tmp_path):
    monkeypatch.setattr(ScoreDifference, "outputs", ScoreDifference.outputs)  # restored afterwards
    modes = []
    monkeypatch.setattr(fp8.RoundedOperands, "__init__", _counted(fp8.RoundedOperands.__init__, modes))
    words = ["gmm", "--out", str(tmp_path / "run"), "--steps", "2", "--langevin-steps", "3", "--fake-score-warmup", "0"]
    assert fp8.main(["distil", "bf16", *words]) == 0
    assert len(modes) == 2 * 3 and all(mode.rounded > 0 for mode in modes)


def _counted(init, modes):
    def counted(self, rounding):
        init(self, rounding)
        modes.append(self)

    return counted
