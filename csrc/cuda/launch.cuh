// Kernel launch. All kernels are launched here.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>
#include <stdio.h>

#include <exception>

#include "kernels.h"

namespace emd::cuda {

// Not std::runtime_error: its header and that of std::string take longer to compile, per
// architecture, than most kernels.
class LaunchError : public std::exception {
 public:
  explicit LaunchError(const char* what, const char* why = "") {
    snprintf(text_, sizeof text_, "emd_fast: %s%s", what, why);
  }
  const char* what() const noexcept override { return text_; }

 private:
  char text_[256];
};

template <class... Parameters>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, Stream stream,
            const Parameters&... parameters) {
  if (blocks == 0) return;
  if (blocks > INT32_MAX) throw LaunchError("too many elements for one CUDA kernel");
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(unsigned(threads));
  config.stream = stream;
  if (const cudaError_t error = cudaLaunchKernelEx(&config, kernel, parameters...)) {
    throw LaunchError("a CUDA kernel did not start: ", cudaGetErrorString(error));
  }
}

}  // namespace emd::cuda
