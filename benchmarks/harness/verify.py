"""Verification of every contender against the reference in float64, before it is timed.

Noise. emd_fast, peers and user functions draw the noise of the contract. Eager PyTorch has its own
generator: it is verified with the numbers of the contract passed in, and timed without. Kernels with
noise compiled out are compared with the eager formula in float64 with zero noise, after that formula
has been verified with the noise of the contract. Ops that return only noise are checked by moments.

Bounds on the largest error of each result. For emd_fast: twice the error of eager PyTorch in the same
dtypes, plus 1e-6, plus two units in the last place of the largest float32, plus the noise tolerance
of the contract. For all others: `Bench.roundings` roundings of the result dtype at the largest value,
plus the same noise tolerance.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from benchmarks.harness.contenders import Contender
from benchmarks.harness.declare import BOTH, Bench, Case, Inputs, RandomTensors
from emd_fast import Noise

NOISE_ERROR = 5e-6
SEED = 2**31 - 1

Results = dict[str, Tensor]


@dataclass(frozen=True)
class Verification:
    """Outcome of a verification.

    Attributes:
        error, bound: of the result whose error is largest relative to its bound.
        problem: None if the contender is correct, otherwise one line.
        wrong: True if results are wrong; False if the contender could not run.
    """

    error: float | None = None
    bound: float | None = None
    problem: str | None = None
    wrong: bool = False


def call(bench: Bench, case: Case, contender: Contender, inputs: Inputs, **noises: Tensor) -> Any:
    """Makes the timed call: the op, and its backward pass if the case has one."""
    arguments, cotangent = inputs
    if case.passes != BOTH:
        with torch.no_grad():
            return contender.function(**arguments, **noises)
    out = contender.function(**arguments, **noises)
    return out, torch.autograd.grad(out, [arguments[name] for name in bench.gradients], cotangent)


def with_gradients(bench: Bench, case: Case, inputs: Inputs) -> Inputs:
    """Sets requires_grad on the inputs that the case differentiates."""
    if case.passes == BOTH:
        for name in bench.gradients:
            inputs.arguments[name].requires_grad_()
    return inputs


class Verifier:
    """Verifies the contenders of one case on the same inputs."""

    def __init__(self, bench: Bench, case: Case) -> None:
        self.bench, self.case = bench, case
        self._inputs = with_gradients(bench, case, bench.inputs(RandomTensors(case, SEED)))
        self._noises = bench.noises(self._inputs.arguments) if bench.noises else {}
        exact = Contender("reference in float64", bench.exact, in_place=False)
        self._exact = self._results(exact, _doubled)
        self._eager = Contender(bench.eager_name, bench.eager, in_place=False, draws="own")
        self._formula = (
            None if bench.moments else self._worst(self._formula_in_double(self._noises), self._exact, _same_formula)
        )
        self._eager_results = None if bench.moments else self._results(self._eager, _copied, **self._noises)

    def verify(self, contender: Contender) -> Verification:
        """Verifies a contender. An exception of the contender becomes the problem of the result."""
        try:
            if self.bench.moments and contender.draws == "own":
                return self._moments(contender)
            noises = self._noises if contender.draws == "own" else {}
            results = self._results(contender, _copied, **noises)
        except Exception as error:
            return Verification(problem=f"cannot run: {type(error).__name__}: {_line(error)}")
        if contender.draws == "none":
            zeros = {name: torch.zeros_like(noise) for name, noise in self._noises.items()}
            return self._worst(results, self._formula_in_double(zeros), self._as_good_as_eager)
        if contender.draws == "own" and self._formula and self._formula.problem:
            return Verification(problem=f"not the op's formula: {self._formula.problem}", wrong=True)
        return self._worst(results, self._exact, self._as_good_as_eager if contender.ours else self._rounded)

    def _results(self, contender: Contender, prepared: Callable[[Any], Any], **noises: Tensor) -> Results:
        """Returns by name: updated arguments, results and gradients. Works on copies of the inputs."""
        inputs = Inputs(*pytree.tree_map(prepared, tuple(self._inputs)))
        noises = pytree.tree_map(prepared, noises)
        out = call(self.bench, self.case, contender, inputs, **noises)
        out, gradients = out if self.case.passes == BOTH else (out, ())
        returned = [] if out is None else list(out) if isinstance(out, (tuple, list)) else [out]
        if contender.in_place:
            returned = [inputs.arguments[name] for name in self.bench.written] + returned
        names = [*self.bench.written, *(f"result {i}" for i in range(len(returned) - len(self.bench.written)))]
        results = dict(zip(names, returned, strict=True))
        return results | {
            f"gradient of {name}": g for name, g in zip(self.bench.gradients[: len(gradients)], gradients, strict=True)
        }

    def _formula_in_double(self, noises: Mapping[str, Tensor]) -> Results:
        return self._results(self._eager, _doubled, **noises)

    def _worst(self, results: Results, exact: Results, bound: Callable[[str, Tensor, Tensor], float]) -> Verification:
        if missing := exact.keys() ^ results.keys():
            return Verification(problem=f"it must return what the op returns: {', '.join(sorted(missing))}", wrong=True)
        worst = Verification(0.0, 0.0)
        share = -1.0
        for name, right in exact.items():
            found = results[name]
            if problem := self._form(name, found, right):
                return Verification(problem=problem, wrong=True)
            error = _largest_error(found, right)
            limit = bound(name, found, right)
            # Written as `<=` so that a NaN fails.
            problem = None if error <= limit else f"{name} is off by {error:.3g}, allowed {limit:.3g}"
            now = error / limit if limit else (0.0 if error == 0 else math.inf)
            if problem or now > share:
                worst, share = Verification(error, limit, problem, wrong=problem is not None), now
            if problem:
                break
        return worst

    def _form(self, name: str, found: Tensor, right: Tensor) -> str | None:
        if not isinstance(found, Tensor):
            return f"{name} must be a tensor, got {type(found).__name__}"
        if found.shape != right.shape:
            return f"{name} must have shape {tuple(right.shape)}, got {tuple(found.shape)}"
        expected = getattr(self, "_eager_results", None)
        if expected and found.dtype not in (expected[name].dtype, torch.float64):
            return f"{name} must be {expected[name].dtype}, got {found.dtype}"
        return None

    def _noise_allowance(self) -> float:
        return NOISE_ERROR if self._noises or self.bench.moments else 0.0

    def _as_good_as_eager(self, name: str, found: Tensor, right: Tensor) -> float:
        if self._eager_results is None:  # the op returns only noise: contract tolerance plus one rounding
            return self._rounded(name, found, right, slack=1)
        eager = _largest_error(self._eager_results[name], self._exact[name])
        if not eager <= self._rounded(name, found, right):  # eager is wrong itself and sets no standard
            return self._rounded(name, found, right)
        return 2 * eager + 1e-6 + 2 * 2.0**-23 * _largest(right) + self._noise_allowance()

    def _rounded(self, name: str, found: Tensor, right: Tensor, slack: float | None = None) -> float:
        slack = self.bench.roundings if slack is None else slack
        return slack * torch.finfo(found.dtype).eps / 2 * _largest(right) + self._noise_allowance()

    def _moments(self, contender: Contender) -> Verification:
        assert self.bench.moments is not None
        numbers = self._results(contender, _copied)["result 0"]
        if problem := self._form("result 0", numbers, self._exact["result 0"]):
            return Verification(problem=problem, wrong=True)
        worst = Verification(0.0, 0.0)
        share = -1.0
        for what, values, (mean, deviation) in zip(
            ("mean", "mean square"), (numbers.double(), numbers.double().square()), self.bench.moments, strict=True
        ):
            error = abs(float(values.mean()) - mean)
            limit = 6 * deviation / math.sqrt(numbers.numel()) + torch.finfo(numbers.dtype).eps
            if not error <= limit:
                return Verification(error, limit, f"its {what} is off by {error:.3g}, allowed {limit:.3g}", wrong=True)
            if error / limit > share:
                worst, share = Verification(error, limit), error / limit
        return worst


def _same_formula(name: str, found: Tensor, right: Tensor) -> float:
    """Bound between two float64 formulas; the reference draws and scales its noise in float32."""
    return 2.0**-23 * max(1.0, _largest(right))


def _largest_error(found: Tensor, right: Tensor) -> float:
    return float((found.detach().double() - right.detach().double()).abs().max()) if right.numel() else 0.0


def _largest(values: Tensor) -> float:
    return float(values.detach().abs().max()) if values.numel() else 0.0


def _copied(value: Any) -> Any:
    if isinstance(value, Noise):
        same = copy.copy(value)
        same.state = value.state.clone()
        return same
    return value.detach().clone().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def _doubled(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().double().requires_grad_(value.requires_grad)
    if isinstance(value, torch.dtype):
        return torch.float64
    return _copied(value)


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:200] + " ..."
