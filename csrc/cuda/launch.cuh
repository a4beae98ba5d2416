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

inline void check(cudaError_t error, const char* what) {
  if (error) throw LaunchError(what, cudaGetErrorString(error));
}

// Dynamic shared memory in bytes, and blocks of a cluster.
struct LaunchShape {
  int shared = 0, cluster = 1;
};

template <class... Parameters>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, const LaunchShape& shape, Stream stream,
            const Parameters&... parameters) {
  if (blocks == 0) return;
  if (blocks > INT32_MAX) throw LaunchError("too many elements for one CUDA kernel");
  constexpr int kAlwaysAllowed = 48 * 1024;
  if (shape.shared > kAlwaysAllowed) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shape.shared),
          "a CUDA kernel did not get its shared memory: ");
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = size_t(shape.shared);
  config.stream = stream;
  cudaLaunchAttribute cluster = {};
  if (shape.cluster > 1) {
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = unsigned(shape.cluster);
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    config.attrs = &cluster;
    config.numAttrs = 1;
  }
  check(cudaLaunchKernelEx(&config, kernel, parameters...), "a CUDA kernel did not start: ");
}

template <class... Parameters>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, Stream stream,
            const Parameters&... parameters) {
  launch(kernel, blocks, threads, LaunchShape{}, stream, parameters...);
}

}  // namespace emd::cuda
