#include <torch/library.h>

#include "tensors.h"

namespace emd::cpu {
namespace {

at::Tensor normal(at::IntArrayRef size, const at::Tensor& noise, int64_t stream, int64_t substep,
                  at::ScalarType dtype) {
  const at::Tensor out = at::empty(size, dtype);
  const Draw op = {shape_of(size), noise_key(noise, stream, substep), target(out)};
  in_parallel(op.shape.tiles(), kNoisyTiles, kernels().normal, op);
  return out;
}

TORCH_LIBRARY_IMPL(emd_fast_native, CPU, m) { m.impl("normal", normal); }

}  // namespace
}  // namespace emd::cpu
