#include "devices.h"

namespace emd {
namespace {

// The value depends on drift and weight only. The other arguments are for the gradient.
template <class Device>
at::Tensor m_step_loss(const at::Tensor& /*generated*/, const at::Tensor& drift, const at::Tensor& /*alpha*/,
                       const at::Tensor& /*sigma*/, const at::Tensor& weight) {
  const Call call(drift);
  const at::Tensor loss = Device::empty(weight.sizes(), at::kFloat, call);
  Device::run(MStepLoss{call.shape, call.state(drift), call.per_sample(weight), loss.mutable_data_ptr<float>()}, call);
  return loss;
}

template <class Device>
at::Tensor m_step_loss_backward(const at::Tensor& grad, const at::Tensor& drift, const at::Tensor& alpha,
                                const at::Tensor& sigma, const at::Tensor& weight, at::ScalarType dtype) {
  const Call call(drift);
  const at::Tensor out = Device::empty(drift.sizes(), dtype, call);
  Device::run(MStepGradient{call.shape, call.state(drift), call.per_sample(grad), call.per_sample(alpha),
                            call.per_sample(sigma), call.per_sample(weight), call.target(out)},
              call);
  return out;
}

template <class Device>
void add_m_step_loss(torch::Library& library) {
  library.impl("m_step_loss", m_step_loss<Device>);
  library.impl("m_step_loss_backward", m_step_loss_backward<Device>);
}

EMD_REGISTER(add_m_step_loss)

}  // namespace
}  // namespace emd
