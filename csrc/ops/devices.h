// The devices that the ops are compiled for. A device has empty(size, dtype, call), which returns
// a new tensor, and run(op, call), which computes one of the structs of core/arguments.h.
#pragma once

#include <torch/library.h>

#include "../cpu/device.h"
#if defined(EMD_CUDA)
#include "../cuda/device.h"
#endif

// EMD_REGISTER(add) calls add<Device>(library), which registers an op for each device;
// EMD_REGISTER_CUDA registers an op that the CPU has in csrc/cpu for CUDA alone. The tests define
// their own macros, to run the CUDA code without a GPU.
#if defined(EMD_REGISTER)
#elif defined(EMD_CUDA)
#define EMD_REGISTER(add)                                                     \
  TORCH_LIBRARY_IMPL(emd_fast_native, CPU, m) { add<emd::cpu::Cpu>(m); }      \
  TORCH_LIBRARY_IMPL(emd_fast_native, CUDA, m) { add<emd::cuda::Cuda>(m); }
#define EMD_REGISTER_CUDA(add) \
  TORCH_LIBRARY_IMPL(emd_fast_native, CUDA, m) { add<emd::cuda::Cuda>(m); }
#else
#define EMD_REGISTER(add) \
  TORCH_LIBRARY_IMPL(emd_fast_native, CPU, m) { add<emd::cpu::Cpu>(m); }
#endif
