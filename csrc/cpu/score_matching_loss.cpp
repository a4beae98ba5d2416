#include <torch/library.h>

#include "means.h"
#include "tensors.h"

namespace emd::cpu {
namespace {

// The tensors have to outlive what is returned.
ScoreMatching score_matching(at::Tensor& output, at::Tensor& x0, at::Tensor& x_t, const at::Tensor& c_skip,
                             const at::Tensor& c_out, const at::Tensor& weight) {
  ScoreMatching op = {};
  op.shape = shape_of(output.sizes());
  op.output = source(output, op.shape);
  op.x0 = source(x0, op.shape);
  op.x_t = source(x_t, op.shape);
  op.c_skip = per_sample(c_skip, op.shape);
  op.c_out = per_sample(c_out, op.shape);
  op.weight = per_sample(weight, op.shape);
  return op;
}

at::Tensor score_matching_loss(at::Tensor output, at::Tensor x0, at::Tensor x_t, const at::Tensor& c_skip,
                               const at::Tensor& c_out, const at::Tensor& weight) {
  ScoreMatching op = score_matching(output, x0, x_t, c_skip, c_out, weight);
  std::vector<double> partial(op.shape.samples * op.shape.tiles_per_sample());
  op.partial = partial.data();
  in_parallel(int64_t(partial.size()), kPlainTiles, kernels().score_matching_loss, op);
  return weighted_means(partial, op.shape, op.weight, 1.0);
}

at::Tensor score_matching_loss_backward(const at::Tensor& grad, at::Tensor output, at::Tensor x0, at::Tensor x_t,
                                        const at::Tensor& c_skip, const at::Tensor& c_out, const at::Tensor& weight) {
  ScoreMatching op = score_matching(output, x0, x_t, c_skip, c_out, weight);
  op.grad = per_sample(grad, op.shape);
  const at::Tensor out = at::empty(output.sizes(), output.scalar_type());
  op.out = target(out);
  in_parallel(op.shape.tiles(), kPlainTiles, kernels().score_matching_gradient, op);
  return out;
}

TORCH_LIBRARY_IMPL(emd_fast_native, CPU, m) {
  m.impl("score_matching_loss", score_matching_loss);
  m.impl("score_matching_loss_backward", score_matching_loss_backward);
}

}  // namespace
}  // namespace emd::cpu
