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

  // work(stream) with the device of the call as the current one.
  template <class Work>
  static void on_device(const Call& call, Work work) {
    const c10::cuda::CUDAGuard guard(call.device);
    work(Stream(c10::cuda::getCurrentCUDAStream(call.device.index()).stream()));
  }

  template <class Op>
  static void run(const Op& op, const Call& call) {
    on_device(call, [&](Stream stream) { run(op, call, stream); });
  }

 private:
  template <class Op>
  static void run(const Op& op, const Call& call, Stream stream) {
    if constexpr (requires { op.loss; }) {
      const at::Tensor scratch = empty({scratch_of(op.shape)}, at::kFloat, call);
      cuda::run(op, scratch.mutable_data_ptr<float>(), stream);
    } else {
      cuda::run(op, stream);
    }
  }
};

}  // namespace emd::cuda
