#include "devices.h"

namespace emd {
namespace {

template <class Device>
at::Tensor score_matching_loss(at::Tensor output, at::Tensor x0, at::Tensor x_t, const at::Tensor& c_skip,
                               const at::Tensor& c_out, const at::Tensor& weight) {
  const Call call(output);
  const at::Tensor loss = Device::empty(weight.sizes(), at::kFloat, call);
  Device::run(ScoreMatchingLoss{call.shape, call.source(output), call.source(x0), call.source(x_t),
                                call.per_sample(c_skip), call.per_sample(c_out), call.per_sample(weight),
                                loss.mutable_data_ptr<float>()},
              call);
  return loss;
}

template <class Device>
at::Tensor score_matching_loss_backward(const at::Tensor& grad, at::Tensor output, at::Tensor x0, at::Tensor x_t,
                                        const at::Tensor& c_skip, const at::Tensor& c_out, const at::Tensor& weight) {
  const Call call(output);
  const at::Tensor out = Device::empty(output.sizes(), output.scalar_type(), call);
  Device::run(ScoreMatchingGradient{call.shape, call.source(output), call.source(x0), call.source(x_t),
                                    call.per_sample(grad), call.per_sample(c_skip), call.per_sample(c_out),
                                    call.per_sample(weight), call.target(out)},
              call);
  return out;
}

template <class Device>
void add_score_matching_loss(torch::Library& library) {
  library.impl("score_matching_loss", score_matching_loss<Device>);
  library.impl("score_matching_loss_backward", score_matching_loss_backward<Device>);
}

EMD_REGISTER(add_score_matching_loss)

}  // namespace
}  // namespace emd
