#include <torch/library.h>

#include "means.h"
#include "tensors.h"

namespace emd::cpu {
namespace {

// The value is that of the drift alone; the other arguments matter to the gradient only.
at::Tensor m_step_loss(const at::Tensor& /*generated*/, const at::Tensor& drift, const at::Tensor& /*alpha*/,
                       const at::Tensor& /*sigma*/, const at::Tensor& weight) {
  MStepLoss op = {};
  op.shape = shape_of(drift.sizes());
  op.drift = state(drift, op.shape);
  std::vector<double> partial(op.shape.samples * op.shape.tiles_per_sample());
  op.partial = partial.data();
  in_parallel(int64_t(partial.size()), kPlainTiles, kernels().m_step_loss, op);
  return weighted_means(partial, op.shape, per_sample(weight, op.shape), 0.5);
}

at::Tensor m_step_loss_backward(const at::Tensor& grad, const at::Tensor& drift, const at::Tensor& alpha,
                                const at::Tensor& sigma, const at::Tensor& weight, at::ScalarType dtype) {
  MStepGradient op = {};
  op.shape = shape_of(drift.sizes());
  op.drift = state(drift, op.shape);
  op.grad = per_sample(grad, op.shape);
  op.alpha = per_sample(alpha, op.shape);
  op.sigma = per_sample(sigma, op.shape);
  op.weight = per_sample(weight, op.shape);
  const at::Tensor out = at::empty(drift.sizes(), dtype);
  op.out = target(out);
  in_parallel(op.shape.tiles(), kPlainTiles, kernels().m_step_gradient, op);
  return out;
}

TORCH_LIBRARY_IMPL(emd_fast_native, CPU, m) {
  m.impl("m_step_loss", m_step_loss);
  m.impl("m_step_loss_backward", m_step_loss_backward);
}

}  // namespace
}  // namespace emd::cpu
