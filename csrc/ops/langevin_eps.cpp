#include "devices.h"

namespace emd {
namespace {

constexpr int64_t kEpsStream = 2;

template <class Device>
at::Tensor langevin_eps(at::Tensor& eps, at::Tensor& drift, const std::optional<at::Tensor>& x, at::TensorList outputs,
                        const at::Tensor& coefs, const at::Tensor& alpha, const at::Tensor& sigma, double step_size,
                        const std::optional<at::Tensor>& step_size_per_sample, bool exact, const at::Tensor& noise, int64_t substep,
                        at::ScalarType cotangent_dtype) {
  const Call call(eps);
  LangevinEps op = {};
  op.shape = call.shape;
  op.eps = call.state(eps);
  op.drift = call.state(drift);
  std::vector<at::Tensor> terms;
  if (x) terms.push_back(*x);
  terms.insert(terms.end(), outputs.begin(), outputs.end());
  op.terms = int(terms.size());
  TORCH_CHECK(0 < op.terms && op.terms <= kMaxTerms, "expected 1 to ", kMaxTerms, " terms, got ", op.terms);
  TORCH_CHECK(coefs.dim() == 2 && coefs.size(1) == op.terms, "expected one column of coefs per term");
  for (int t = 0; t < op.terms; t++) {
    op.term[t] = call.source(terms[t]);
    op.coef[t] = call.per_sample(coefs.select(1, t));
  }
  op.alpha = call.per_sample(alpha);
  op.sigma = call.per_sample(sigma);
  op.step_size = call.per_sample(step_size_per_sample, step_size);
  op.exact = exact;
  op.noise = call.noise(noise, kEpsStream, substep);
  const at::Tensor cotangent = Device::empty(eps.sizes(), cotangent_dtype, call);
  op.out = call.target(cotangent);
  Device::run(op, call);
  return cotangent;
}

template <class Device>
void add_langevin_eps(torch::Library& library) {
  library.impl("langevin_eps", langevin_eps<Device>);
}

EMD_REGISTER(add_langevin_eps)

}  // namespace
}  // namespace emd
