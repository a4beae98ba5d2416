// emd_fast::group_norm and its backward op on CPU and CUDA tensors, without the Python dispatch to a
// backend. On small tensors that takes longer than the kernels. Other backends, and CUDA tensors in a
// layout that the CUDA kernels do not serve, go through emd_fast_fallback.
#include <torch/library.h>

#include "cpu/group_norm.h"
#if defined(EMD_CUDA)
#include "ops/group_norm.h"
#endif

namespace emd {
namespace {

struct Cpu {
  static constexpr std::string_view kName = "cpu";
  static constexpr auto forward = cpu::group_norm;
  static constexpr auto backward = cpu::group_norm_backward;
  static bool serves(const at::Tensor&) { return true; }
};

#if defined(EMD_CUDA)
struct Cuda {
  static constexpr std::string_view kName = "cuda";
  static constexpr auto forward = cuda_group_norm;
  static constexpr auto backward = cuda_group_norm_backward;
  static bool serves(const at::Tensor& x) { return has_channels_last(x); }
};
#endif

// "auto" means the kernels of the device once this module is loaded.
template <class Device>
bool serves(std::string_view backend, const at::Tensor& x) {
  return (backend == "auto" || backend == Device::kName) && Device::serves(x);
}

template <class Signature>
c10::TypedOperatorHandle<Signature> op_handle(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

using Maybe = std::optional<at::Tensor>;
using Results = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

template <class Device>
Results forward(const at::Tensor& x, c10::SymInt num_groups, const Maybe& weight, const Maybe& bias, double eps,
                const Maybe& add, const Maybe& scale, const Maybe& shift, bool silu, std::string_view backend) {
  if (serves<Device>(backend, x)) {
    return Device::forward(x, num_groups.expect_int(), weight, bias, eps, add, scale, shift, silu);
  }
  static const auto fallback = op_handle<decltype(forward<Device>)>("emd_fast_fallback::group_norm");
  return fallback.call(x, std::move(num_groups), weight, bias, eps, add, scale, shift, silu, backend);
}

template <class Device>
Gradients backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& mean, const at::Tensor& rstd,
                   c10::SymInt num_groups, const Maybe& weight, const Maybe& bias, const Maybe& add, const Maybe& scale,
                   const Maybe& shift, bool silu, std::array<bool, 6> needs, std::string_view backend) {
  if (serves<Device>(backend, x)) {
    return Device::backward(grad, x, mean, rstd, num_groups.expect_int(), weight, bias, add, scale, shift, silu, needs);
  }
  static const auto fallback = op_handle<decltype(backward<Device>)>("emd_fast_fallback::group_norm_backward");
  return fallback.call(grad, x, mean, rstd, std::move(num_groups), weight, bias, add, scale, shift, silu, needs,
                       backend);
}

template <class Device>
void add_ops(torch::Library& library) {
  library.impl("group_norm", forward<Device>);
  library.impl("group_norm_backward", backward<Device>);
}

TORCH_LIBRARY_IMPL(emd_fast, CPU, m) { add_ops<Cpu>(m); }
#if defined(EMD_CUDA)
TORCH_LIBRARY_IMPL(emd_fast, CUDA, m) { add_ops<Cuda>(m); }
#endif

}  // namespace
}  // namespace emd
