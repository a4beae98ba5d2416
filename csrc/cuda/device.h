// A CUDA device of csrc/ops: that of the tensors, which need not be the current device. Work is
// queued on its current stream.
#pragma once

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "../tensors.h"
#include "kernels.h"

namespace emd::cuda {

struct Cuda {
  static at::Tensor empty(at::IntArrayRef size, at::ScalarType dtype, const Call& call) {
    return at::empty(size, at::TensorOptions().dtype(dtype).device(call.device));
  }

  template <class Op>
  static void run(const Op& op, const Call& call) {
    const c10::cuda::CUDAGuard guard(call.device);
    const Stream stream = c10::cuda::getCurrentCUDAStream(call.device.index()).stream();
    if constexpr (requires { op.loss; }) {
      const at::Tensor scratch = empty({scratch_of(op.shape)}, at::kFloat, call);
      cuda::run(op, scratch.mutable_data_ptr<float>(), stream);
    } else {
      cuda::run(op, stream);
    }
  }
};

}  // namespace emd::cuda
