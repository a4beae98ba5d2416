"""Whether numbers are standard normal and independent, by tests that good ones fail about once in 10^5 runs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

KOLMOGOROV = 2.5  # sqrt(n) times the distance is above it with probability 7e-6


def distance(values: Tensor, cdf) -> float:
    """sqrt(n) times the Kolmogorov-Smirnov distance of these numbers from a distribution."""
    n = values.numel()
    ordered = cdf(values.flatten().sort().values.double())
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    return math.sqrt(n) * max((steps[1:] - ordered).max().item(), (ordered - steps[:-1]).max().item())


def assert_uniform(values: Tensor) -> None:
    assert distance(values, lambda v: v) < KOLMOGOROV


def assert_standard_normal(values: Tensor) -> None:
    """Mean, variance, skew and kurtosis within five standard errors, and the whole distribution."""
    n = values.numel()
    x = values.double().flatten()
    # Of the powers of a normal number: mean and variance.
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        found = (x**power).mean().item()
        assert abs(found - mean) < 5 * math.sqrt(variance / n), f"moment {power} is {found}"
    assert distance(values, lambda v: 0.5 * torch.erfc(-v / math.sqrt(2))) < KOLMOGOROV


def assert_independent(a: Tensor, b: Tensor, what: str) -> None:
    """No correlation of two sets of normal numbers, nor of their squares or of their signs."""
    n = a.numel()
    a, b = a.double().flatten(), b.double().flatten()
    for name, f, deviation in (
        ("numbers", lambda v: v, 1.0), ("squares", lambda v: v * v - 1, 2.0), ("signs", torch.sign, 1.0)
    ):  # fmt: skip
        correlation = (f(a) * f(b)).mean().item()
        assert abs(correlation) < 5 * deviation / math.sqrt(n), f"{what}: {name} correlate, {correlation}"
