"""Triton kernels with noise generation compiled out, to measure the cost of random numbers."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any
from unittest import mock

from benchmarks.harness.declare import Bench, Function
from emd_fast import backends

OPS = frozenset({"perturb", "langevin_eps", "langevin_z"})


def without_noise(bench: Bench) -> Function:
    """Returns the op on the Triton backend, its kernels compiled with noise that is 0."""
    functions = {op: getattr(_noiseless_module(op), op) for op in bench.ops or (bench.name,)}
    chosen = backends.implementation

    def implementation(op: str, backend: str, device_type: str) -> Callable[..., Any]:
        return functions.get(op) or chosen(op, backend, device_type)

    def call(**arguments: Any) -> Any:
        # The op looks its implementation up at every call, so checks and dispatch remain those of the op.
        with mock.patch.object(backends, "implementation", implementation), backends.use_backend("triton"):
            return bench.op(**arguments)

    return call


@functools.cache
def _noiseless_module(op: str) -> ModuleType:
    """Loads a second copy of the op's Triton module in which `normals` returns zeros.

    A kernel resolves the functions that it calls in the globals of its module. The copy is therefore
    compiled with zeros, under a separate key in Triton's cache.
    """
    zeros = importlib.import_module("benchmarks.harness.zeros").zeros
    spec = importlib.util.find_spec(f"emd_fast.backends.triton.{op}")
    assert spec is not None and spec.origin is not None and spec.loader is not None
    name = f"benchmarks.harness._noiseless_{op}"
    own = importlib.util.spec_from_file_location(name, spec.origin)
    assert own is not None and own.loader is not None
    module = importlib.util.module_from_spec(own)
    sys.modules[name] = module
    philox = importlib.import_module("emd_fast.backends.triton.philox")
    with mock.patch.object(philox, "normals", zeros):
        own.loader.exec_module(module)
    return module
