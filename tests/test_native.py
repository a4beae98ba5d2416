"""The compiled kernels as a whole: how they were built, and that neither the number of threads nor the instruction set
changes a bit of what they compute. What each op computes is tested beside the op."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from emd_fast.backends import native

ROOT = Path(__file__).resolve().parents[1]

missing = native.why_not("normal", "cpu")
needs_kernels = pytest.mark.skipif(missing is not None, reason=str(missing))

# Prints, for each number of threads, digests of what every kernel computes. Sizes leave rests in vectors, tiles, chunks
# and threads.
DIGEST = """
import hashlib, itertools, json, sys
import kernel_cases
import torch
import emd_fast.ops
from emd_fast.backends import native
from helpers import DTYPES, draw, seeded

ops = torch.ops.emd_fast_native
native.load()
digests = {int(word): {} for word in sys.argv[1:]}


def record(name, *tensors):
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    digests[torch.get_num_threads()][name] = digest.hexdigest()


for number, shape in itertools.product(digests, [(700, 2), (33, 3, 41, 37)]):
    torch.set_num_threads(number)
    for i, (op, arguments) in enumerate(kernel_cases.calls(shape, "contiguous", terms=(3, 5))):
        found = kernel_cases.results(getattr(ops, op), op, arguments, lambda value: value)
        record(f"{op} {i} {shape}", *found)
for number, shape in itertools.product(digests, [(3, 12, 50, 47), (40, 32, 4, 4), (9, 48, 1, 1), (2, 1056, 9, 7)]):
    torch.set_num_threads(number)
    for dtype, layout in itertools.product(DTYPES, ["contiguous", "channels_last"]):
        g = seeded(0)
        x, grad = (draw(shape, g, dtype, layout) for _ in range(2))
        weight, bias = torch.randn(2, shape[1], generator=g)
        add, scale, shift = torch.randn(3, *shape[:2], generator=g)
        y, mean, rstd = ops.group_norm(x, 4, weight, bias, 1e-5, add, scale, shift, True)
        rest = (mean, rstd, 4, weight, bias, add, scale, shift, True, [True] * 6)
        record(f"group_norm {shape} {dtype} {layout}", y, mean, rstd, *ops.group_norm_backward(grad, x, *rest))
print(json.dumps({"isa": native.facts()["isa"], "digests": digests}))
"""


def in_a_process(code: str, isa: str, *words: int) -> str:
    """What the code prints with that instruction set."""
    path = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)],
        env={**os.environ, "EMD_FAST_ISA": isa, "PYTHONPATH": path}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def digests(isa: str, *threads: int) -> dict[str, dict[str, str]]:
    """By number of threads and what was computed."""
    said = json.loads(in_a_process(DIGEST, isa, *threads))
    assert said["isa"] == isa and list(said["digests"]) == list(map(str, threads))
    return said["digests"]


def runs_here(isa: str) -> bool:
    # get_cpu_capability() would follow ATEN_CPU_CAPABILITY, which our kernels do not read.
    supported = {"avx2": torch.cpu._is_avx2_supported, "avx512": torch.cpu._is_avx512_supported}
    return isa == "baseline" or supported[isa]()


@needs_kernels
def test_facts_and_the_fastest_instruction_set():
    facts = native.facts()
    assert facts["torch"] == torch.__version__ and facts["build_type"] == "Release"
    assert facts["isas_built"][0] == "baseline" and facts["isa"] in facts["isas_built"]
    if "EMD_FAST_ISA" not in os.environ:
        assert facts["isa"] == [isa for isa in facts["isas_built"] if runs_here(isa)][-1]


@needs_kernels
def test_every_op_is_registered():
    native.load()
    for op in native.OPS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"emd_fast_native::{op}", "CPU"), op


@needs_kernels
@pytest.mark.slow
def test_same_bits_for_any_threads_and_instruction_set():
    isas = [isa for isa in native.facts()["isas_built"] if runs_here(isa)]
    found = {isa: digests(isa, *((1, 2, 3) if isa == isas[-1] else (1,))) for isa in isas}
    expected = found["baseline"]["1"]
    for isa, threads in ((isa, threads) for isa, of_it in found.items() for threads in of_it):
        got = found[isa][threads]
        different = [name for name in expected if got[name] != expected[name]]
        assert got.keys() == expected.keys() and not different, f"{isa}, {threads} threads: {different}"


@needs_kernels
def test_an_instruction_set_that_is_not_there_is_refused():
    code = "from emd_fast.backends import native; print(native.why_not('normal', 'cpu'))"
    assert "EMD_FAST_ISA must be one of baseline" in in_a_process(code, "sse9")


def test_why_a_build_does_not_serve_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "_FACTS", tmp_path / "_build.json")
    monkeypatch.setattr(native, "_load", native._load.__wrapped__)
    reasons = {"not built: EMD_FAST_BUILD=none": {"reason": "not built: EMD_FAST_BUILD=none", "torch": None}}
    again = f"built against torch 2.0.1, running {torch.__version__}: install emd_fast again"
    for reason, facts in {**reasons, again: {"reason": None, "torch": "2.0.1"}}.items():
        native._FACTS.write_text(json.dumps(facts))
        assert native.why_not("normal", "cpu") == reason
        if facts["reason"]:
            assert native.facts() == {"reason": reason}
            with pytest.raises(RuntimeError, match="EMD_FAST_BUILD=none"):
                native.load()
    native._FACTS.write_text(
        json.dumps({"reason": None, "cuda_reason": "not built: no nvcc", "torch": torch.__version__})
    )
    if native.facts().get("cuda") is None:
        assert native.why_not("normal", "cuda") in ("not built: no nvcc", native.why_not("normal", "cpu"))
    assert native.why_not("integers", "cuda") == native.why_not("normal", "mps") == "it does not have this op"
