// The devices that the ops are compiled for. A device has empty(size, dtype, call), which returns
// a new tensor, and run(op, call), which computes one of the structs of core/arguments.h.
#pragma once

#include <torch/library.h>

#include "../cpu/device.h"
#if defined(EMD_CUDA)
#include "../cuda/device.h"
#endif

// EMD_REGISTER(add) calls add<Device>(library), which registers an op for each device. The tests
// define their own macro, to run the CUDA code without a GPU.
#if defined(EMD_REGISTER)
#elif defined(EMD_CUDA)
#define EMD_REGISTER(add)                                                     \
  TORCH_LIBRARY_IMPL(emd_fast_native, CPU, m) { add<emd::cpu::Cpu>(m); }      \
  TORCH_LIBRARY_IMPL(emd_fast_native, CUDA, m) { add<emd::cuda::Cuda>(m); }
#else
#define EMD_REGISTER(add) \
  TORCH_LIBRARY_IMPL(emd_fast_native, CPU, m) { add<emd::cpu::Cpu>(m); }
#endif
