"""Every Triton kernel compiled for GPUs that are not here, and what the machine code must and must not have."""

import re

import pytest
import torch
from ahead_of_time import TARGETS, compiled, launches, specialised

from emd_fast import Noise

SHAPE = (4, 3, 64, 64)
BF16, F32 = torch.bfloat16, torch.float32


def call(op, dtype, layout=torch.contiguous_format, by_sample=False):
    """The arguments of a call on tensors of SHAPE, networks' outputs in this dtype and layout."""
    state, v, noise = torch.zeros(SHAPE), torch.ones(SHAPE[0]), Noise(0).state
    output = torch.zeros(SHAPE, dtype=dtype).contiguous(memory_format=layout)
    step = (0.0, v, True) if by_sample else (0.1, None, False)  # size, by sample, exact
    return {
        "uniform": (list(SHAPE), noise, 1, 0),
        "normal": (list(SHAPE), noise, 1, 0, dtype),
        "perturb": (output, v, v, None, noise, 1, 0, dtype),
        "langevin_eps": (state, state, None, [output, output], torch.ones(4, 2), v, v, *step, noise, 0, dtype),
        "langevin_z": (state, output, *step, noise, 0),
        "m_step_loss": (output, state, v, v, v),
        "m_step_loss_backward": (v, state, v, v, v, dtype),
        "score_matching_loss": (output, output, output, v, v, v),
        "score_matching_loss_backward": (v, output, output, output, v, v, v),
        "residual": (output, output, torch.zeros(3, dtype=dtype), torch.zeros(3), 0.5),
        "geglu": (output,),
        "geglu_backward": (output[..., :32].contiguous(), output),
    }[op]


# Vectors of 16 bytes that one thread reads and writes at least, by op and dtype of the outputs.
VECTORS = {
    "uniform": {F32: (0, 1)},
    "normal": {BF16: (0, 1), F32: (0, 1)},
    "perturb": {BF16: (1, 1), F32: (1, 1)},
    "langevin_eps": {BF16: (6, 5), F32: (4, 3)},
    "langevin_z": {BF16: (3, 2), F32: (2, 1)},
    "m_step_loss": {BF16: (1, 0)},
    "score_matching_loss": {BF16: (3, 0), F32: (3, 0)},
    "m_step_loss_backward": {BF16: (2, 1), F32: (1, 1)},
    "score_matching_loss_backward": {BF16: (3, 1), F32: (3, 1)},
    "residual": {BF16: (2, 1), F32: (2, 1)},
}
CASES = [(op, dtype, target) for op in VECTORS for dtype in VECTORS[op] for target in TARGETS]


def name(value):
    return str(value).removeprefix("torch.")


@pytest.mark.parametrize(("op", "dtype", "target"), CASES, ids=name)
@pytest.mark.exhaustive
def test_vectors_registers_and_the_rounding_of_products(op, dtype, target):
    reads, writes = VECTORS[op][dtype]
    made = [(s.kernel.__name__, compiled(s, target)) for s in launches(op, *call(op, dtype))]
    for _, code in made:
        code.check(registers=64)  # 8 programs of 4 warps fit a multiprocessor
    main = made[0][1]
    # From sm_100 on a vector may have 32 bytes.
    assert main.count(r"ld\.global\S*\.v4\.b32") + 2 * main.count(r"ld\.global\S*\.v8\.b32") >= reads, "16-byte reads"
    assert main.count(r"st\.global\S*\.v4\.b32") + 2 * main.count(r"st\.global\S*\.v8\.b32") >= writes, "16-byte writes"
    if dtype == BF16 and op in ("normal", "perturb", "langevin_eps"):
        assert main.count(r"cvt\.rn\.bf16x2\.f32"), "bfloat16 is rounded to nearest"
    for kernel, code in made:
        # The polynomials of Box-Muller fuse, and each of their fmas has a number in it; one of two tensors has none.
        found, wrong = code.fused()
        assert not wrong, f"{kernel}: fma of {wrong[:3]}"
        assert (found > 0) == (op in ("uniform", "normal", "perturb", "langevin_eps", "langevin_z"))
        # Without .rn, ptxas may contract a product into a sum.
        loose = re.findall(r"(?:mul|add|sub)(?:\.ftz)?\.f32", code.ptx)
        assert not loose, f"{kernel}: {loose[:3]}"


@pytest.mark.parametrize(("op", "reads", "writes"), [("geglu", 2, 1), ("geglu_backward", 3, 2)])
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.exhaustive
def test_geglu(op, reads, writes, dtype, target):
    """Its products may fuse: nothing cancels in them."""
    (found,) = launches(op, *call(op, dtype))
    code = compiled(found, target)
    code.check(registers=64)
    assert code.count(r"ld\.global\S*\.v4\.b32") + 2 * code.count(r"ld\.global\S*\.v8\.b32") >= reads
    assert code.count(r"st\.global\S*\.v4\.b32") + 2 * code.count(r"st\.global\S*\.v8\.b32") >= writes


@pytest.mark.parametrize("target", [80, 90])
@pytest.mark.exhaustive
def test_the_bias_of_channels_last_images_is_read_as_a_vector(target):
    x = torch.zeros(2, 320, 8, 8, dtype=BF16).contiguous(memory_format=torch.channels_last)
    (found,) = launches("residual", x, x, torch.zeros(320, dtype=BF16), None, 1.0)
    code = compiled(found, target)
    code.check(registers=64)
    assert code.count(r"ld\.global") == code.count(r"ld\.global\S*\.v4\.b32") == 3


@pytest.mark.exhaustive
def test_no_contraction_in_the_machine_code():
    """perturb with eps given is two products and a sum, and nothing else in floating point."""
    output, v = torch.zeros(SHAPE), torch.ones(SHAPE[0])
    (launch,) = launches("perturb", output, v, v, output, None, 0, 0, F32)
    sass = compiled(launch, 90).sass()
    assert "FMUL" in sass and "FADD" in sass and "FFMA" not in sass


@pytest.mark.exhaustive
def test_both_words_of_a_product_come_from_one_instruction():
    """Ten rounds of two products a block: 20 multiplications, of which the first round is shared by a thread."""
    code = compiled(launches("normal", *call("normal", F32))[0], 90)
    blocks = 2  # of a thread: 1024 elements, 128 threads
    assert code.count(r"mul\.wide\.u32") <= 20 * blocks and not code.count(r"mul\.hi")
    assert code.count(r"sqrt\.approx") == 2 * blocks  # a radius serves two numbers


@pytest.mark.parametrize("op", ["perturb", "langevin_eps", "langevin_z", "score_matching_loss"])
@pytest.mark.exhaustive
def test_channels_last(op):
    layout = torch.channels_last
    found = launches(op, *call(op, BF16, layout, by_sample=True))
    main = compiled(found[0], 90)
    main.check()
    if op != "score_matching_loss":  # all of its tensors have the same order in memory
        assert found[0].constants["PLANES"]
        assert main.count(r"st\.global\S*\.v4"), "what is written is contiguous"


@pytest.mark.parametrize("terms", [1, 4, 5])
@pytest.mark.exhaustive
def test_any_number_of_outputs(terms):
    state, v, noise = torch.zeros(SHAPE), torch.ones(SHAPE[0]), Noise(0).state
    outputs = [torch.zeros(SHAPE, dtype=BF16) for _ in range(min(terms, 4))]
    x = state if terms == 5 else None
    args = (state, state, x, outputs, torch.ones(SHAPE[0], terms), v, v, 0.1, None, False, noise, 0, BF16)
    (found,) = launches("langevin_eps", *args)
    compiled(found, 90).check(registers=80)


# Where substep and, if the op takes one, stream are among the arguments.
AT = {"uniform": (3, 2), "normal": (3, 2), "perturb": (6, 5), "langevin_eps": (11,), "langevin_z": (6,)}


@pytest.mark.parametrize("op", AT)
def test_no_substep_or_stream_asks_for_another_kernel(op):
    keys = set()
    for substep in (0, 1, 16, 65535):
        (found,) = launches(op, *(substep if i in AT[op] else value for i, value in enumerate(call(op, BF16))))
        assert found.args[found.kernel.arg_names.index("substep")] == substep
        constants, attributes = {}, {}
        types = [
            specialised(value, (i,), parameter.do_not_specialize, constants, attributes)
            for i, (value, parameter) in enumerate(zip(found.args, found.kernel.params, strict=False))
        ]
        keys.add(str((types, sorted(constants), sorted(attributes), found.constants)))
    assert len(keys) == 1
