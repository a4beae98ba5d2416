// The one place where kernels are launched.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include <stdexcept>
#include <string>

#include "kernels.h"

namespace emd::cuda {

template <class... Parameters>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, Stream stream, const Parameters&... parameters) {
  if (blocks == 0) return;
  if (blocks > INT32_MAX) throw std::runtime_error("emd_fast: too many elements for one CUDA kernel");
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(unsigned(threads));
  config.stream = stream;
  if (const cudaError_t error = cudaLaunchKernelEx(&config, kernel, parameters...)) {
    throw std::runtime_error(std::string("emd_fast: a CUDA kernel did not start: ") + cudaGetErrorString(error));
  }
}

}  // namespace emd::cuda
