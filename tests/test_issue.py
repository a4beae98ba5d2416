"""benchmarks.issue: what machine code is read as, and the bounds that the kernels must reach by their machine code."""

import pytest
from cuda_objects import tool

from benchmarks import issue
from benchmarks.harness import sass

# As cuobjdump prints it: a loop in a loop, and the padding behind the end.
SASS = """
		Function : some_kernel
        /*0000*/                   MOV R1, c[0x0][0x28] ;                /* 0x00000a0000017a02 */
                                                                         /* 0x000fe40000000f00 */
        /*0010*/                   IMAD.MOV.U32 R2, RZ, RZ, 0x10 ;       /* 0x00000010ff027424 */
        /*0020*/                   LDG.E.128.CONSTANT R4, [R2.64] ;      /* 0x0000000602047981 */
        /*0030*/                   FFMA R4, R4, R5, R6 ;                 /* 0x0000000504047223 */
        /*0040*/                   MUFU.EX2 R4, R4 ;                     /* 0x0000000400047308 */
        /*0050*/                   STG.E.128 [R2.64], R4 ;               /* 0x0000000402007986 */
        /*0060*/               @P0 BRA 0x20 ;                            /* 0xffffffb000000947 */
        /*0070*/                   ULDC.64 UR4, c[0x0][0x118] ;          /* 0x0000460000047ab9 */
        /*0080*/              @!P1 BRA 0x10 ;                            /* 0xffffff8000009947 */
        /*0090*/                   EXIT ;                                /* 0x000000000000794d */
        /*00a0*/                   BRA 0xa0;                             /* 0xfffffff000007947 */
"""
SHAPES = [(16, 192, 64, 64), (16, 384, 32, 32), (16, 576, 16, 16), (16, 768, 8, 8)]
needs_tools = pytest.mark.skipif(
    any(tool(name) is None for name in ("nvcc", "cuobjdump", "c++")), reason="no nvcc, cuobjdump or C++ compiler"
)


def test_the_innermost_loop_and_its_classes():
    ((name, code),) = sass.functions(SASS).items()
    (loop,) = sass.loops(code)
    assert name == "some_kernel" and len(code) == 11
    assert [i.opcode for i in loop.instructions] == ["LDG", "FFMA", "MUFU", "STG", "BRA"]
    assert loop.classes() == {"memory": 2, "fp32": 1, "mufu": 1, "branch": 1}
    assert loop.moved("LDG") == loop.moved("STG") == 16 and loop.count("MUFU") == 1
    assert {i.kind for i in code} == set(sass.CLASSES)


def test_a_loop_over_the_tensor_is_counted_by_its_elements():
    (code,) = sass.functions(SASS).values()
    (hot,) = issue.hot_loops(code, 2, 1)
    assert hot.does == "apply" and hot.instructions == 5 / 8 and hot.passes == 2
    assert hot.per_element["mufu"] == 1 / 8


@pytest.fixture(scope="module")
def codes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("issue")
    return {kernel: issue.machine_code(kernel, 90, folder) for kernel in issue.KERNELS}


@needs_tools
@pytest.mark.exhaustive
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("kernel", "least"), [("group_norm", 0.85), ("group_norm_backward", 0.80)])
def test_the_bound_of_group_norm_is_near_the_ideal_read(codes, kernel, least, shape):
    tile, found = issue.bound(kernel, shape, code=codes[kernel])
    assert tile.resident and [loop.does for loop in found.loops] == ["copy", "sums", "apply"]
    assert found.limit == "memory" and found.ratio >= least
    # So too where the sums do not overlap with what comes after the exchange.
    assert found.ideal / found.in_phases >= least


@needs_tools
@pytest.mark.exhaustive
def test_instructions_of_silu(codes):
    loops = [
        issue.bound("group_norm", SHAPES[0], silu=silu, code=codes["group_norm"])[1].loops for silu in (True, False)
    ]
    with_silu, without = (next(loop for loop in found if loop.does == "apply") for found in loops)
    assert with_silu.per_element["mufu"] == 2 and "mufu" not in without.per_element
    assert with_silu.instructions - without.instructions <= 6
    assert with_silu.instructions <= 9


@needs_tools
@pytest.mark.exhaustive
def test_every_loop_over_the_tensor_has_16_byte_accesses(codes):
    for kernel, code in codes.items():
        tensors = 2 if kernel.endswith("backward") else 1
        for name, body in code.items():
            if "AnyType" in name or not any(dtype in name for dtype in issue.MANGLED.values()):
                continue
            bytes_of = 4 if "kernelIf" in name else 2
            assert issue.hot_loops(body, bytes_of, tensors), name
            for loop in sass.loops(body):
                if loop.count("STG") and loop.classes()["fp32"] > 8:
                    assert all(i.bytes == 16 for i in loop.instructions if i.opcode == "STG"), name


@needs_tools
@pytest.mark.exhaustive
def test_the_command(capsys):
    assert issue.main(["group_norm_backward", "16,576,16,16"]) == 0
    said = capsys.readouterr().out
    assert "calculated, not measured" in said and "resident" in said and "mufu" in said


def test_bad_arguments(capsys):
    for words in (["group_norm", "16,192"], ["group_norm", "16,100,8,8"], ["langevin_z", "16,192,8,8"]):
        with pytest.raises(SystemExit):
            issue.main(words)
    assert "C a multiple of 32" in capsys.readouterr().err


def test_a_missing_nvcc_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(issue, "tool", lambda name: None)
    assert issue.main(["group_norm", "16,192,64,64"]) == 1
    said = capsys.readouterr().err
    assert "was not found" in said and said.count("\n") == 1
