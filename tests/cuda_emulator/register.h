// Included before everything else: what the library registers for CUDA tensors serves CPU tensors, under another name.
#pragma once

#define EMD_REGISTER(add) \
  TORCH_LIBRARY_IMPL(emd_fast_emulated, CPU, m) { add<emd::cuda::Cuda>(m); }
#define EMD_REGISTER_CUDA(add) EMD_REGISTER(add)
