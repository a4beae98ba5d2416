#include "devices.h"

namespace emd {
namespace {

template <class Device>
at::Tensor perturb(at::Tensor x0, const at::Tensor& alpha, const at::Tensor& sigma,
                   const std::optional<at::Tensor>& eps, const std::optional<at::Tensor>& noise, int64_t stream,
                   int64_t substep, at::ScalarType dtype) {
  TORCH_CHECK(eps.has_value() != noise.has_value(), "expected either eps or noise");
  const Call call(x0);
  const at::Tensor out = Device::empty(x0.sizes(), dtype, call);
  at::Tensor given = eps.value_or(at::Tensor());
  Perturb op = {};
  op.shape = call.shape;
  op.x0 = call.source(x0);
  op.alpha = call.per_sample(alpha);
  op.sigma = call.per_sample(sigma);
  op.draws = noise.has_value();
  if (op.draws) {
    op.noise = call.noise(*noise, stream, substep);
  } else {
    op.eps = call.source(given);
  }
  op.out = call.target(out);
  Device::run(op, call);
  return out;
}

template <class Device>
void add_perturb(torch::Library& library) {
  library.impl("perturb", perturb<Device>);
}

EMD_REGISTER(add_perturb)

}  // namespace
}  // namespace emd
