#include <torch/library.h>

#include "tensors.h"

namespace emd::cpu {
namespace {

constexpr int64_t kStream = 2;

at::Tensor langevin_eps(at::Tensor& eps, at::Tensor& drift, const std::optional<at::Tensor>& x, at::TensorList outputs,
                        const at::Tensor& coefs, const at::Tensor& alpha, const at::Tensor& sigma, double step_size,
                        const std::optional<at::Tensor>& step_sizes, const at::Tensor& noise, int64_t substep,
                        at::ScalarType cotangent_dtype) {
  LangevinEps op = {};
  op.shape = shape_of(eps.sizes());
  op.eps = state(eps, op.shape);
  op.drift = state(drift, op.shape);
  std::vector<at::Tensor> terms;
  if (x) terms.push_back(*x);
  terms.insert(terms.end(), outputs.begin(), outputs.end());
  op.terms = int(terms.size());
  TORCH_CHECK(0 < op.terms && op.terms <= kMaxTerms, "expected 1 to ", kMaxTerms, " terms, got ", op.terms);
  TORCH_CHECK(coefs.dim() == 2 && coefs.size(1) == op.terms, "expected one column of coefs per term");
  for (int t = 0; t < op.terms; t++) {
    op.term[t] = source(terms[t], op.shape);
    op.coef[t] = per_sample(coefs.select(1, t), op.shape);
  }
  op.alpha = per_sample(alpha, op.shape);
  op.sigma = per_sample(sigma, op.shape);
  const float shared = float(step_size);
  op.step_size = step_sizes ? per_sample(*step_sizes, op.shape) : PerSample{&shared, 0};
  op.noise = noise_key(noise, kStream, substep);
  const at::Tensor cotangent = at::empty(eps.sizes(), cotangent_dtype);
  op.out = target(cotangent);
  in_parallel(op.shape.tiles(), kNoisyTiles, kernels().langevin_eps, op);
  return cotangent;
}

TORCH_LIBRARY_IMPL(emd_fast_native, CPU, m) { m.impl("langevin_eps", langevin_eps); }

}  // namespace
}  // namespace emd::cpu
