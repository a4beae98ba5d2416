"""What Triton's interpreter must be told before it stands for a GPU."""

import dataclasses
import functools
import inspect
from typing import Any

import numpy as np
import torch


def round_to_bfloat16_as_a_gpu_does() -> None:
    """The interpreter cuts a float32 off; cvt.rn.bf16x2.f32, which tests/test_triton_compile.py finds, rounds it."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    cut = builder.cast_impl

    def cast(self, source, to):
        if (source.dtype.scalar, to.scalar) == (tl.bfloat16, tl.float32):
            return interpreter.TensorHandle(widened(source.data), tl.float32)
        if (source.dtype.scalar, to.scalar) != (tl.float32, tl.bfloat16):
            return cut(self, source, to)
        rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
        return interpreter.TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)

    builder.cast_impl = cast


def widened(bits: np.ndarray) -> np.ndarray:
    """bfloat16, kept as bits, in float32: exact. The interpreter's own takes subnormal numbers and all others apart."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def leave_what_is_masked_undefined() -> None:
    """The interpreter reads 0 where a mask is off and a kernel asks for nothing; on a GPU that may be any number."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    load = builder.create_masked_load
    # Not a number, in the bits that the interpreter keeps of each dtype.
    undefined = {tl.float32: np.float32("nan"), tl.float16: np.float16("nan"), tl.bfloat16: np.uint16(0x7FC0)}

    def masked(self, pointers, mask, other, *rest: Any):
        dtype = pointers.get_element_ty()
        if other is None and dtype in undefined:
            other = interpreter.TensorHandle(np.full(pointers.data.shape, undefined[dtype]), dtype)
        return load(self, pointers, mask, other, *rest)

    builder.create_masked_load = masked


def multiply_matrices_as_a_gpu_does() -> None:
    """It takes bfloat16 for integers, and a thread adds products of float32 in order, by fused multiply-adds.

    So (a b)^T and b^T a^T are equal bit for bit, as the sums of the BLAS under numpy are not.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    multiply = builder.create_dot

    def of_numbers(x: Any) -> Any:
        return interpreter.TensorHandle(widened(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x

    def dot(self, a, b, start, *rest: Any):
        if (a.dtype.scalar, b.dtype.scalar) != (tl.float32, tl.float32):
            return multiply(self, of_numbers(a), of_numbers(b), start, *rest)
        left, right, total = a.data.astype(np.float64), b.data.astype(np.float64), start.data.copy()
        for product in left.T[:, :, None] * right[:, None, :]:  # exact in float64
            np.add(total, product, out=total, dtype=np.float64, casting="same_kind")
        return interpreter.TensorHandle(total, tl.float32)

    builder.create_dot = dot


def count_with_numbers() -> None:
    """Numbers are arrays of one element in the interpreter, which NumPy since 2.5 does not hand to int()."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched


def spend_less() -> None:
    """Most of the interpreter's time goes into what leaves no trace in a result."""
    patch_the_language_once_a_launch()
    look_dtypes_up()
    leave_overflow_alone()
    make_a_type_once()
    leave_equal_shapes_alone()


def leave_overflow_alone() -> None:
    """Each sum of integers is made once more in 64 bits and compared, for an assertion that only debugging looks at."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def look_dtypes_up() -> None:
    """A table of all dtypes is made at every look into it."""
    from triton.runtime import interpreter

    find, known = interpreter._get_np_dtype, {}

    def numpy_dtype(dtype):
        if (scalar := dtype.scalar).name not in known:
            known[scalar.name] = find(scalar)
        return known[scalar.name]

    interpreter._get_np_dtype = numpy_dtype


def patch_the_language_once_a_launch() -> None:
    """Every call in a kernel walks over all of triton.language; what the first put in place stays for the launch."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch, run = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[tuple[bool, bool]] = set()

    @functools.cache
    def sees(fn: Any) -> tuple[bool, bool]:
        modules = [x for x in fn.__globals__.values() if inspect.ismodule(x)]
        return any(x is tl for x in modules), any(x is tl.core for x in modules)

    def patch_once(fn):
        if sees(fn) in patched:
            return interpreter._LangPatchScope()
        patched.add(sees(fn))
        return patch(fn)

    def launch(self, *args: Any, **kwargs: Any):
        patched.clear()
        try:
            return run(self, *args, **kwargs)
        finally:
            patched.clear()

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch


def make_a_type_once() -> None:
    """Every operation makes the type of its result anew, and from it the shape of a tensor, number by number."""
    import triton.language as tl

    make, initialise, known = tl.block_type.__init__, tl.tensor.__init__, {}

    def shared(cls, element_ty, shape):
        sizes = tuple(size.value if isinstance(size, tl.constexpr) else size for size in shape)
        return known.setdefault((element_ty.name, sizes), object.__new__(cls))

    def make_once(self, element_ty, shape):
        if not vars(self):
            make(self, element_ty, shape)

    def of_type(self, handle, type):
        if "of_tensors" not in vars(type):
            initialise(self, handle, type)
            type.of_tensors = vars(self).copy()
        vars(self).update(type.of_tensors, handle=handle)

    tl.block_type.__new__, tl.block_type.__init__, tl.tensor.__init__ = shared, make_once, of_type


def leave_equal_shapes_alone() -> None:
    """Two blocks of one shape are broadcast to it, dimension by dimension, before every operation on both."""
    from triton.language.semantic import TritonSemantic

    broadcast = TritonSemantic.broadcast_impl_value

    def unless_equal(self, a, b):
        if a.type.is_block() and b.type.is_block() and a.handle.data.shape == b.handle.data.shape:
            return a, b
        return broadcast(self, a, b)

    TritonSemantic.broadcast_impl_value = unless_equal
