#include <torch/library.h>

#include "tensors.h"

namespace emd::cpu {
namespace {

at::Tensor perturb(at::Tensor x0, const at::Tensor& alpha, const at::Tensor& sigma,
                   const std::optional<at::Tensor>& eps, const std::optional<at::Tensor>& noise, int64_t stream,
                   int64_t substep, at::ScalarType dtype) {
  TORCH_CHECK(eps.has_value() != noise.has_value(), "expected either eps or noise");
  const at::Tensor out = at::empty(x0.sizes(), dtype);
  at::Tensor given = eps.value_or(at::Tensor());
  Perturb op = {};
  op.shape = shape_of(x0.sizes());
  op.x0 = source(x0, op.shape);
  op.alpha = per_sample(alpha, op.shape);
  op.sigma = per_sample(sigma, op.shape);
  op.draws = noise.has_value();
  if (op.draws) {
    op.noise = noise_key(*noise, stream, substep);
  } else {
    op.eps = source(given, op.shape);
  }
  op.out = target(out);
  in_parallel(op.shape.tiles(), op.draws ? kNoisyTiles : kPlainTiles, kernels().perturb, op);
  return out;
}

TORCH_LIBRARY_IMPL(emd_fast_native, CPU, m) { m.impl("perturb", perturb); }

}  // namespace
}  // namespace emd::cpu
