// emd_fast::group_norm and its backward op on CPU tensors, without the Python dispatch to a
// backend. On small tensors that takes longer than the loops. Other backends are called through
// emd_fast_fallback.
#include <torch/library.h>

#include "group_norm.h"

namespace emd::cpu {
namespace {

// "auto" means "cpu" for CPU tensors once this module is loaded.
bool is_cpu_backend(std::string_view backend) { return backend == "auto" || backend == "cpu"; }

template <class Signature>
c10::TypedOperatorHandle<Signature> op_handle(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

using Maybe = std::optional<at::Tensor>;
using Results = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Results forward(const at::Tensor& x, c10::SymInt num_groups, const Maybe& weight, const Maybe& bias, double eps,
                const Maybe& add, const Maybe& scale, const Maybe& shift, bool silu, std::string_view backend) {
  if (is_cpu_backend(backend)) {
    return group_norm(x, num_groups.expect_int(), weight, bias, eps, add, scale, shift, silu);
  }
  static const auto fallback = op_handle<decltype(forward)>("emd_fast_fallback::group_norm");
  return fallback.call(x, std::move(num_groups), weight, bias, eps, add, scale, shift, silu, backend);
}

Gradients backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& mean, const at::Tensor& rstd,
                   c10::SymInt num_groups, const Maybe& weight, const Maybe& bias, const Maybe& add, const Maybe& scale,
                   const Maybe& shift, bool silu, std::array<bool, 6> needs, std::string_view backend) {
  if (is_cpu_backend(backend)) {
    return group_norm_backward(grad, x, mean, rstd, num_groups.expect_int(), weight, bias, add, scale, shift, silu,
                               needs);
  }
  static const auto fallback = op_handle<decltype(backward)>("emd_fast_fallback::group_norm_backward");
  return fallback.call(grad, x, mean, rstd, std::move(num_groups), weight, bias, add, scale, shift, silu, needs,
                       backend);
}

TORCH_LIBRARY_IMPL(emd_fast, CPU, m) {
  m.impl("group_norm", forward);
  m.impl("group_norm_backward", backward);
}

}  // namespace
}  // namespace emd::cpu
