"""The CUDA kernels compiled for GPUs that are not here, and what the machine code must and must not have."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from cuda_objects import ROOT, TARGETS, compiled, tool

pytestmark = [
    pytest.mark.exhaustive,
    *(pytest.mark.skipif(tool(name) is None, reason=f"no {name} was found") for name in ("nvcc", "cmake", "cuobjdump")),
]

# 16-byte reads and writes of the kernels for dense, aligned tensors; a tensor may be float32, which takes two.
VECTORS = {
    "uniform Body<1>": (0, 2),
    "normal Body<1>": (0, 2),
    "perturb Body<1, 0>": (4, 2),
    "perturb Body<1, 1>": (2, 2),
    **{f"langevin_eps Body<{terms}>": (4 + 2 * terms, 6) for terms in range(1, 6)},
    "langevin_z Body<1>": (4, 2),
    "m_step_loss Gradient<1>": (2, 2),
    "m_step_loss Term<1> by 32": (2, 0),
    "m_step_loss Term<1> by 256": (2, 0),
    "score_matching_loss Gradient<1>": (6, 2),
    "score_matching_loss Term<1> by 32": (6, 0),
    "score_matching_loss Term<1> by 256": (6, 0),
}
SOURCES = ["uniform", "normal", "perturb", "langevin_eps", "langevin_z", "m_step_loss", "score_matching_loss"]
GROUP_NORM = ["group_norm", "group_norm_backward", "group_norm_vectors"]


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()  # of this worker, where there are several: beside it is one of all of them
    return compiled((folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "cuda")


def test_every_kernel_is_compiled_for_every_target(objects):
    for target in TARGETS:
        names = {kernel.name for kernel in objects.kernels if kernel.target == target}
        assert set(VECTORS) <= names
        assert {name.replace("<1", "<0") for name in VECTORS if "eps" not in name} | {"langevin_eps Body<0>"} <= names


def test_no_spills_no_local_memory_and_few_registers(objects):
    # Five blocks of 128 threads on a processor at least, which have 480 bytes of a call's tensors under way each.
    elementwise = [kernel for kernel in objects.kernels if not kernel.name.startswith("group_norm")]
    assert max(kernel.registers for kernel in elementwise) <= 96
    for kernel in objects.kernels:
        assert kernel.spills == kernel.stack == 0, kernel
    for source in (*SOURCES, *GROUP_NORM):
        for target, (name, found) in ((t, item) for t in TARGETS for item in objects.machine_code(source)[t].items()):
            local = [i for i in found if i.startswith(("LDL", "STL"))]
            assert not local, f"{name} for sm_{target}: {local}"


@pytest.mark.parametrize("target", TARGETS)
def test_group_norm_has_room_for_two_blocks(objects, target):
    """Where x has two bytes: 80 registers for each of 2 x 384 threads. Shared memory is in test_group_norm_tile.py."""
    resident = {k.name: k.registers for k in objects.kernels if k.target == target and " resident" in k.name}
    of_two_bytes = {name: n for name, n in resident.items() if "float16" in name.lower()}
    assert len(resident) == 12 and len(of_two_bytes) == 8, sorted(resident)
    assert max(of_two_bytes.values()) <= 80 and max(resident.values()) <= 168


@pytest.mark.parametrize("target", TARGETS)
def test_16_byte_accesses(objects, target):
    for source in SOURCES:
        for name, found in objects.machine_code(source)[target].items():
            if name in VECTORS:
                for kind, least in zip(("LDG", "STG"), VECTORS[name], strict=True):
                    wide = sum(n for i, n in found.items() if i.startswith(kind) and ".128" in i)
                    assert wide >= least, f"{name}: {wide} of {kind}"
                # What a sample has one of is read by itself; the elements are not.
                narrow = [i for i in found if i.startswith(("STG", "LDG")) and ".U16" in i]
                assert not narrow, f"{name}: {narrow}"


def test_products_are_rounded_before_they_are_added(objects):
    for source in SOURCES:
        for name, ptx in objects.ptx(source).items():
            # Without .rn, ptxas may contract a product into a sum.
            loose = re.findall(r"\b(?:mul|add|sub)(?:\.ftz)?\.f32", ptx)
            assert not loose, f"{name}: {loose[:3]}"
            numbers = set(re.findall(r"mov\.(?:b|f)32\s+(%\w+), 0f", ptx))
            fused = re.findall(r"fma\.\S+\s+([^;]*);", ptx)
            # The formulas of the noise fuse, and each of their fmas has a number in it; one of two tensors has none.
            of_data = [f for f in fused if not any(o.startswith("0f") or o in numbers for o in f.split(", "))]
            draws = source in ("uniform", "normal", "langevin_eps", "langevin_z") or name.endswith(", 1>")
            assert not of_data, f"{name}: fma of {of_data[:3]}"
            assert bool(fused) == draws, name


def test_no_contraction_in_the_machine_code(objects):
    """perturb with eps given is products and sums, and nothing else in floating point."""
    for target in TARGETS:
        found = objects.machine_code("perturb")[target]["perturb Body<1, 0>"]
        kinds = {i.split(".")[0] for i in found}
        assert {"FMUL", "FADD"} <= kinds or {"FMUL2", "FADD2"} <= kinds, sorted(kinds)
        assert not {"FFMA", "FFMA2"} & kinds, f"sm_{target}"


@pytest.mark.parametrize("source", ["ops/langevin_eps", "ops/group_norm", "group_norm_direct", "group_norm_autograd"])
def test_the_bindings_compile_against_torch_and_cuda(source):
    """As EMD_FAST_BUILD=cuda compiles them; a torch without CUDA has the headers all the same."""
    told = subprocess.run([str(tool("nvcc")), "--dryrun", "-c", "any.cu"], capture_output=True, text=True).stderr
    toolkit = Path(str(re.search(r"TOP=(\S+)", told)[1])) / "include"
    from torch.utils.cpp_extension import include_paths

    command = [
        str(tool("c++")), "-std=c++20", "-fsyntax-only", "-Wall", "-Werror=format", "-DEMD_CUDA",
        "-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE", f"-isystem{toolkit}", *(f"-isystem{path}" for path in include_paths()),
        str(ROOT / "csrc" / f"{source}.cpp"),
    ]  # fmt: skip
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
