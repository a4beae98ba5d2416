"""Our Triton kernels with the noise compiled out: what an op would cost if random numbers were free."""

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
    """The op of `bench` on the Triton backend, its kernels compiled with numbers that are all 0."""
    twins = {op: getattr(_twin(op), op) for op in bench.ops or (bench.name,)}
    chosen = backends.implementation

    def implementation(op: str, backend: str, device_type: str) -> Callable[..., Any]:
        return twins.get(op) or chosen(op, backend, device_type)

    def call(**arguments: Any) -> Any:
        # The op asks for its implementation at every call: the checks and the dispatch stay those of the op.
        with mock.patch.object(backends, "implementation", implementation), backends.use_backend("triton"):
            return bench.op(**arguments)

    return call


@functools.cache
def _twin(op: str) -> ModuleType:
    """The Triton module of the op, loaded a second time while `normals` gives nothing but zeros.

    A kernel finds the functions that it calls among the globals of its module, so that the twin is compiled with the
    zeros, and under a key of its own in Triton's cache.
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
