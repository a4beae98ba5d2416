"""Bad arguments of every op: one error that names the argument, before a backend is chosen and anything is written."""

import math

import pytest
import torch
from helpers import assert_same, naming

from emd_fast import Noise, ops

X, ONE, Q = torch.ones(2, 3), torch.ones(2), torch.ones(2, 3, 2, 8)
NAN, META = float("nan"), Noise(0, device="meta")
STRIDED = torch.ones(2, 3, 8, 2).transpose(2, 3)

# What is wrong for one kind of argument: pairs of the error and the values that raise it, for shape (2, 3).
FLOATING = [(TypeError, 1.0, None, X.double(), X.long())]
LEADING = [*FLOATING, (ValueError, torch.tensor(1.0))]
OTHER = [*FLOATING, (ValueError, torch.ones(2, 4), torch.ones(3), torch.ones(2, 1), X.to("meta"))]
CONSTANT = [(ValueError, X.clone().requires_grad_())]
STATE = [*CONSTANT, (TypeError, X.half(), X.bfloat16()), (ValueError, torch.ones(3, 2).T)]
PER_SAMPLE = [
    (TypeError, 1.0, ONE.half(), ONE.bfloat16(), ONE.double()),
    (ValueError, torch.ones(1), torch.ones(3), torch.ones(2, 1), ONE.to("meta"), ONE.clone().requires_grad_()),
    (ValueError, torch.tensor([1.0, NAN]), torch.tensor([math.inf, 1.0])),
]
POSITIVE = [*PER_SAMPLE, (ValueError, torch.tensor([1.0, 0.0]), -ONE)]
STEP_SIZE = [
    (TypeError, "0.1", True, ONE.double()),
    (ValueError, -1e-9, 1.1, NAN, torch.tensor(0.1), torch.ones(3), torch.ones(2, 1), ONE.to("meta")),
    (ValueError, torch.tensor([0.1, -0.1]), torch.tensor([NAN, 0.1]), torch.tensor([0.1, 1.01])),
]
NOISE = [(TypeError, 3, None, torch.zeros(4).long())]
SUBSTEP = [(ValueError, 2**16, -1), (TypeError, "1", 1.0)]
DRAWN = {
    "size": [(ValueError, (), (2, -1)), (TypeError, (2, 1.0))],
    "noise": NOISE,
    "stream": [(ValueError, -1, 2**16), (TypeError, 1.0)],
    "substep": SUBSTEP,
}
DTYPE = [(TypeError, torch.float64, torch.int64, "float32")]
INTEGRATOR = [(ValueError, "Euler", "", None, True)]
INTEGER = [(TypeError, 2.0, True, None, "3")]

# op -> a good call, and what each argument may not be.
OPS = {
    "uniform": ({"size": (2, 3), "noise": Noise(0), "stream": 0}, DRAWN),
    "normal": ({"size": (2, 3), "noise": Noise(0), "stream": 0}, {**DRAWN, "dtype": DTYPE}),
    "integers": (
        {"high": 7, "size": (2, 3), "noise": Noise(0), "stream": 0},
        {**DRAWN, "high": [*INTEGER, (ValueError, 0, -1, 2**31 + 1)]},
    ),
    "perturb": (
        {"x0": X, "alpha": ONE, "sigma": ONE, "eps": X},
        {"x0": LEADING, "alpha": PER_SAMPLE, "sigma": PER_SAMPLE, "eps": [*OTHER[1:], *CONSTANT], "dtype": DTYPE},
    ),
    "langevin_eps": (
        {"eps": X, "drift": X + 1, "x": X + 2, "outputs": [X + 3, X + 4], "coefs": torch.ones(2, 3), "alpha": ONE,
         "sigma": ONE, "step_size": 0.1, "noise": Noise(0)},
        {"eps": [*LEADING, *STATE], "drift": [*OTHER, *STATE, (ValueError, torch.ones(1, 3).expand(2, 3))],
         "x": OTHER[1:], "outputs": [(ValueError, [], [X] * 5), ((TypeError, ValueError), torch.ones(2, 2, 3), None)],
         "coefs": [(ValueError, torch.ones(2, 2), torch.full((2, 3), NAN)), (TypeError, torch.ones(2, 3).half())],
         "alpha": PER_SAMPLE, "sigma": POSITIVE, "step_size": STEP_SIZE, "noise": [*NOISE, (ValueError, META)],
         "substep": SUBSTEP, "integrator": INTEGRATOR, "cotangent_dtype": DTYPE[:1]},
    ),
    "langevin_z": (
        {"z": X, "z_grad": X + 1, "step_size": 0.1, "noise": Noise(0)},
        {"z": [*LEADING, *STATE], "z_grad": OTHER, "step_size": STEP_SIZE, "noise": [*NOISE, (ValueError, META)],
         "substep": SUBSTEP, "integrator": INTEGRATOR},
    ),
    "m_step_loss": (
        {"generated": X, "drift": X, "alpha": ONE, "sigma": ONE, "weight": ONE},
        {"generated": LEADING, "drift": [*OTHER, *STATE], "alpha": PER_SAMPLE, "sigma": POSITIVE, "weight": PER_SAMPLE},
    ),
    "score_matching_loss": (
        {"output": X, "x0": X, "x_t": X, "c_skip": ONE, "c_out": ONE, "weight": ONE},
        {"output": LEADING, "x0": [*OTHER, *CONSTANT], "x_t": [*OTHER, *CONSTANT], "c_skip": PER_SAMPLE,
         "c_out": PER_SAMPLE, "weight": PER_SAMPLE},
    ),
    "group_norm": (
        {"x": torch.ones(2, 4, 3), "num_groups": 2},
        {"x": [(TypeError, torch.ones(2, 4, 3).double(), None), (ValueError, torch.ones(4))],
         "num_groups": [(ValueError, 3, 0, -2), (TypeError, 2.0, None)],
         "weight": [(ValueError, torch.ones(3), torch.ones(4, device="meta")), (TypeError, torch.ones(4).double())],
         "bias": [(ValueError, torch.ones(1, 4)), (TypeError, 0.0)], "eps": [(ValueError, 0.0, -1e-5, NAN)],
         "add": [(ValueError, torch.ones(2, 4, 1), torch.ones(1, 4))], "scale": [(ValueError, torch.ones(4, 2))],
         "shift": [(TypeError, torch.ones(2, 4).long())], "activation": [(ValueError, "relu", True)]},
    ),
    "residual": (
        {"x": X, "skip": X},
        {"x": [*FLOATING, (ValueError, torch.ones(3))], "skip": OTHER,
         "bias": [(ValueError, ONE, torch.ones(1, 3), X[0].to("meta")), (TypeError, 0.0, torch.ones(3).long())],
         "skip_bias": [(ValueError, ONE, torch.ones(())), (TypeError, torch.ones(3).double())],
         "scale": [(ValueError, NAN, math.inf), (TypeError, "1", True, None, ONE)]},
    ),
    "geglu": ({"packed": Q}, {"packed": [*LEADING, (ValueError, torch.ones(2, 3), torch.ones(3))]}),
    "attention": (
        {"q": Q, "k": Q, "v": Q},
        {"q": [(TypeError, Q.double(), None), (ValueError, Q[0], STRIDED)],
         "k": [(ValueError, torch.ones(2, 3, 2, 4), torch.ones(3, 3, 2, 8), torch.ones(2, 3, 1, 8)),
               (ValueError, torch.ones(2, 3, 16), Q.to("meta"), STRIDED), (TypeError, None, Q.half())],
         "v": [(ValueError, torch.ones(2, 4, 2, 8), STRIDED), (TypeError, Q.bfloat16())],
         "backend": [(ValueError, "cpu", "auto")], "scale": [(ValueError, NAN, math.inf), (TypeError, True, "1")]},
    ),
}  # fmt: skip
# Arguments that are wrong together, or under another name: (op, changes, error, what the message names).
TOGETHER = [
    *(
        (op, {"noise": Noise(0, substep=65535), "substep": 1}, ValueError, "substep")
        for op in ("uniform", "normal", "integers", "langevin_eps", "langevin_z")
    ),
    *((op, {"noise": Noise(0, first_sample=2**32 - 1)}, ValueError, "samples") for op in list(OPS)[:3]),
    ("perturb", {"noise": Noise(0), "stream": 1}, ValueError, "either eps or noise"),
    ("perturb", {"eps": None}, ValueError, "either eps or noise"),
    ("perturb", {"eps": None, "noise": Noise(0)}, ValueError, "stream"),
    ("perturb", {"eps": None, "noise": Noise(0), "stream": 2**16}, ValueError, "stream"),
    ("perturb", {"eps": None, "noise": 7, "stream": 1}, TypeError, "noise"),
    ("perturb", {"eps": None, "noise": META, "stream": 1}, ValueError, "noise"),
    ("langevin_eps", {"x": None}, ValueError, "coefs"),
    ("langevin_eps", {"outputs": [X, torch.ones(3)]}, ValueError, r"outputs\[1\]"),
    ("langevin_eps", {"outputs": [X, X.to("meta")]}, ValueError, r"outputs\[1\]"),
    ("langevin_eps", {"outputs": [X.double()] * 2}, TypeError, r"outputs\[0\]"),
    ("attention", {"q": torch.ones(2, 3, 2, 257)}, ValueError, "head_dim"),
    ("attention", {"q": torch.ones(2, 3, 2, 0)}, ValueError, "head_dim"),
    ("attention", {"q": STRIDED}, ValueError, "q.*unit stride"),
    ("attention", {"v": STRIDED}, ValueError, "v.*unit stride"),
]
CASES = [
    *(
        (op, {name: value}, error, name)
        for op, (_, arguments) in OPS.items()
        for name, kinds in arguments.items()
        for error, *values in kinds
        for value in values
    ),
    *TOGETHER,
]


@pytest.mark.parametrize(("op", "changed", "error", "named"), CASES)
def test_bad_input_is_named_and_nothing_is_written(op, changed, error, named):
    given = {**OPS[op][0], **changed}
    kept = {k: v.clone() for k, v in given.items() if isinstance(v, torch.Tensor) and not v.is_meta}
    with pytest.raises(error, match=naming(named)):
        getattr(ops, op)(**given)
    for name, value in kept.items():
        assert_same(given[name].detach(), value.detach(), name)


def test_every_op_is_here():
    assert set(OPS) == set(ops.__all__)


MEMORY = torch.rand(6) / 2 + 0.25
PAIR = {"coefs": torch.ones(2, 3), "alpha": ONE, "sigma": ONE, "step_size": 0.1, "noise": Noise(0)}


@pytest.mark.parametrize(
    ("op", "given"),
    [
        ("langevin_eps", {"eps": MEMORY[:2], "drift": MEMORY[1:3], "x": ONE, "outputs": [ONE, ONE], **PAIR}),
        ("langevin_eps", {"eps": MEMORY[:2], "drift": ONE, "x": MEMORY[1:3], "outputs": [ONE, ONE], **PAIR}),
        ("langevin_eps", {"eps": ONE, "drift": MEMORY[:2], "x": X[0, :2], "outputs": [X[0, :2], MEMORY[:1].expand(2)],
                          **PAIR}),
        ("langevin_eps", {"eps": MEMORY[:2], "drift": X[0, :2], "x": ONE, "outputs": [ONE, ONE], **PAIR,
                          "alpha": MEMORY[:2]}),
        *(("langevin_z", {"z": MEMORY[:4], "z_grad": z_grad, "step_size": 0.1, "noise": Noise(0)})
          for z_grad in (MEMORY[:4], MEMORY[2:], MEMORY[1:2].expand(4))),
        ("langevin_z", {"z": MEMORY[:2], "z_grad": MEMORY[2:4], "step_size": MEMORY[1:3], "noise": Noise(0)}),
    ],
)  # fmt: skip
def test_overlapping_memory_is_refused(op, given):
    before = MEMORY.clone()
    with pytest.raises(ValueError, match="overlap"):
        getattr(ops, op)(**given)
    assert torch.equal(MEMORY, before)
