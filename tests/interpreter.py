"""What Triton's interpreter must be told before it stands for a GPU."""

import numpy as np
import torch


def round_to_bfloat16_as_a_gpu_does() -> None:
    """The interpreter cuts a float32 off; cvt.rn.bf16x2.f32, which tests/test_triton_compile.py finds, rounds it."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    cut = builder.cast_impl

    def cast(self, source, to):
        if (source.dtype.scalar, to.scalar) != (tl.float32, tl.bfloat16):
            return cut(self, source, to)
        rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
        return interpreter.TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)

    builder.cast_impl = cast
