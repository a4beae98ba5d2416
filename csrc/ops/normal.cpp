#include "devices.h"

namespace emd {
namespace {

template <class Device>
at::Tensor normal(at::IntArrayRef size, const at::Tensor& noise, int64_t stream, int64_t substep,
                  at::ScalarType dtype) {
  const Call call(size, noise);
  const at::Tensor out = Device::empty(size, dtype, call);
  Device::run(Normal{call.shape, call.noise(noise, stream, substep), call.target(out)}, call);
  return out;
}

template <class Device>
void add_normal(torch::Library& library) {
  library.impl("normal", normal<Device>);
}

EMD_REGISTER(add_normal)

}  // namespace
}  // namespace emd
