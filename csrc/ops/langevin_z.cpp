#include "devices.h"

namespace emd {
namespace {

constexpr int64_t kZStream = 3;

template <class Device>
void langevin_z(at::Tensor& z, at::Tensor z_grad, double step_size,
                const std::optional<at::Tensor>& step_size_per_sample, bool exact, const at::Tensor& noise, int64_t substep) {
  const Call call(z);
  LangevinZ op = {};
  op.shape = call.shape;
  op.z = call.state(z);
  op.gradient = call.source(z_grad);
  op.step_size = call.per_sample(step_size_per_sample, step_size);
  op.exact = exact;
  op.noise = call.noise(noise, kZStream, substep);
  Device::run(op, call);
}

template <class Device>
void add_langevin_z(torch::Library& library) {
  library.impl("langevin_z", langevin_z<Device>);
}

EMD_REGISTER(add_langevin_z)

}  // namespace
}  // namespace emd
