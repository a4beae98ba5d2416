#include "devices.h"

namespace emd {
namespace {

template <class Device>
at::Tensor uniform(at::IntArrayRef size, const at::Tensor& noise, int64_t stream, int64_t substep) {
  const Call call(size, noise);
  const at::Tensor out = Device::empty(size, at::kFloat, call);
  Device::run(Uniform{call.shape, call.noise(noise, stream, substep), call.target(out)}, call);
  return out;
}

template <class Device>
void add_uniform(torch::Library& library) {
  library.impl("uniform", uniform<Device>);
}

EMD_REGISTER(add_uniform)

}  // namespace
}  // namespace emd
