// What the same per-element formulas need to compile for a CPU loop and for a CUDA kernel.
#pragma once

#if defined(__CUDACC__)
#define EMD_HD __host__ __device__ __forceinline__
#else
// Always inlined: these headers are compiled once per instruction set, and a shared out-of-line copy could be the one
// with instructions that the running machine does not have.
#define EMD_HD inline __attribute__((always_inline))
#endif
