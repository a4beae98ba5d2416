// The autograd formula of emd_fast/ops/group_norm.py in C++, for CPU and CUDA tensors. The Python of
// torch.library takes longer than the kernels on small tensors. Both versions call the same ops,
// with the backend as an argument.
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include <array>

namespace emd {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using Maybe = std::optional<at::Tensor>;
using Results = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using Forward = Results(const at::Tensor&, c10::SymInt, const Maybe&, const Maybe&, double, const Maybe&, const Maybe&,
                        const Maybe&, bool, std::string_view);
using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using Backward = Gradients(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, c10::SymInt,
                           const Maybe&, const Maybe&, const Maybe&, const Maybe&, const Maybe&, bool,
                           std::array<bool, 6>, std::string_view);

template <class Signature>
c10::TypedOperatorHandle<Signature> op_named(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

const c10::TypedOperatorHandle<Forward>& forward_op() {
  static const auto op = op_named<Forward>("emd_fast::group_norm");
  return op;
}

const c10::TypedOperatorHandle<Backward>& backward_op() {
  static const auto op = op_named<Backward>("emd_fast::group_norm_backward");
  return op;
}

at::Tensor or_undefined(const Maybe& tensor) { return tensor.value_or(at::Tensor()); }

Maybe if_defined(const at::Tensor& tensor) { return tensor.defined() ? Maybe(tensor) : std::nullopt; }

struct Derivative : torch::autograd::Function<Derivative> {
  static constexpr bool is_traceable = true;  // it only calls ops through the dispatcher

  static variable_list forward(AutogradContext* ctx, const at::Tensor& x, const c10::SymInt& num_groups,
                               const Maybe& weight, const Maybe& bias, double eps, const Maybe& add, const Maybe& scale,
                               const Maybe& shift, bool silu, const std::string& backend) {
    const at::AutoDispatchBelowAutograd below;
    const auto [y, mean, rstd] =
        forward_op().call(x, num_groups, weight, bias, eps, add, scale, shift, silu, backend);
    ctx->save_for_backward({x, mean, rstd, or_undefined(weight), or_undefined(bias), or_undefined(add),
                            or_undefined(scale), or_undefined(shift)});
    ctx->saved_data["num_groups"] = num_groups;
    ctx->saved_data["silu"] = silu;
    ctx->saved_data["backend"] = backend;
    ctx->set_materialize_grads(false);
    return {y, mean, rstd};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list gradients(10);
    if (!grads[0].defined()) return gradients;
    const variable_list saved = ctx->get_saved_variables();
    const std::array<at::Tensor, 6> inputs = {saved[0], saved[3], saved[4], saved[5], saved[6], saved[7]};
    std::array<bool, 6> needs = {};
    size_t given = 0;  // only tensors that were given have an autograd edge
    for (size_t i = 0; i < needs.size(); i++) needs[i] = inputs[i].defined() && ctx->needs_input_grad(given++);
    const Gradients found = backward_op().call(
        grads[0], saved[0], saved[1], saved[2], ctx->saved_data["num_groups"].toSymInt(), if_defined(inputs[1]),
        if_defined(inputs[2]), if_defined(inputs[3]), if_defined(inputs[4]), if_defined(inputs[5]),
        ctx->saved_data["silu"].toBool(), needs, ctx->saved_data["backend"].toStringRef());
    const auto& [x, weight, bias, add, scale, shift] = found;
    const std::array<const at::Tensor*, 6> all = {&x, &weight, &bias, &add, &scale, &shift};
    constexpr std::array<size_t, 6> kPlaces = {0, 2, 3, 5, 6, 7};  // among the arguments of forward
    for (size_t i = 0; i < needs.size(); i++) {
      if (needs[i]) gradients[kPlaces[i]] = *all[i];
    }
    return gradients;
  }
};

Results group_norm(const at::Tensor& x, c10::SymInt num_groups, const Maybe& weight, const Maybe& bias, double eps,
                   const Maybe& add, const Maybe& scale, const Maybe& shift, bool silu, std::string_view backend) {
  if (!torch::autograd::compute_requires_grad(x, weight, bias, add, scale, shift)) {
    const at::AutoDispatchBelowAutograd below;
    return forward_op().call(x, num_groups, weight, bias, eps, add, scale, shift, silu, backend);
  }
  const variable_list results =
      Derivative::apply(x, num_groups, weight, bias, eps, add, scale, shift, silu, std::string(backend));
  return {results[0], results[1], results[2]};
}

TORCH_LIBRARY_IMPL(emd_fast, AutogradCPU, m) { m.impl("group_norm", group_norm); }
#if defined(EMD_CUDA)
TORCH_LIBRARY_IMPL(emd_fast, AutogradCUDA, m) { m.impl("group_norm", group_norm); }
#endif

}  // namespace
}  // namespace emd
