#include <torch/library.h>

#include "tensors.h"

namespace emd::cpu {
namespace {

constexpr int64_t kStream = 3;

void langevin_z(at::Tensor& z, at::Tensor z_grad, double step_size, const std::optional<at::Tensor>& step_sizes,
                const at::Tensor& noise, int64_t substep) {
  LangevinZ op = {};
  op.shape = shape_of(z.sizes());
  op.z = state(z, op.shape);
  op.gradient = source(z_grad, op.shape);
  const float shared = float(step_size);
  op.step_size = step_sizes ? per_sample(*step_sizes, op.shape) : PerSample{&shared, 0};
  op.noise = noise_key(noise, kStream, substep);
  in_parallel(op.shape.tiles(), kNoisyTiles, kernels().langevin_z, op);
}

TORCH_LIBRARY_IMPL(emd_fast_native, CPU, m) { m.impl("langevin_z", langevin_z); }

}  // namespace
}  // namespace emd::cpu
