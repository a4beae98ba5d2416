// Function attributes for formulas that compile in CPU loops and in CUDA kernels.
#pragma once

#if defined(__CUDACC__)
#define EMD_HD __host__ __device__ __forceinline__
#else
// Always inlined: these headers are compiled once per instruction set. The linker would keep one
// out-of-line copy, possibly with instructions that the running machine lacks.
#define EMD_HD inline __attribute__((always_inline))
#endif
