// The convolution of emd_fast/ops/convolution.py in C++. For small inputs the Python takes
// longer than the convolution. Autograd saves the weight only. The forward pass is PyTorch's
// convolution on any device, or Winograd's algorithm on the CPU where it is supported.
#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "cpu/winograd.h"

namespace emd {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Maybe = std::optional<at::Tensor>;

// "auto" means "cpu" for CPU tensors once this module is loaded.
bool by_winograd(std::string_view backend, const at::Tensor& x, const at::Tensor& weight, const Maybe& bias,
                 at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  return (backend == "auto" || backend == "cpu") &&
         cpu::winograd_serves(x, weight, bias, stride, padding, dilation, groups);
}

// Calls the op through the dispatcher, so that dispatch modes see it.
at::Tensor winograd(const at::Tensor& x, const at::Tensor& weight, const Maybe& bias) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("emd_fast::winograd", "").typed<decltype(winograd)>();
  return op.call(x, weight, bias);
}

at::Tensor pytorch_convolution(const at::Tensor& x, const at::Tensor& weight, const Maybe& bias,
                               at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                               int64_t groups, std::string_view) {
  // Not conv2d, which calls this op: below autograd a dispatch mode would see the name conv2d,
  // which has no FLOP formula.
  return at::convolution(x, weight, bias, stride, padding, dilation, false, {0, 0}, groups);
}

at::Tensor convolution_below_autograd(const at::Tensor& x, const at::Tensor& weight, const Maybe& bias,
                                      at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                                      int64_t groups, std::string_view backend) {
  return by_winograd(backend, x, weight, bias, stride, padding, dilation, groups)
             ? winograd(x, weight, bias)
             : pytorch_convolution(x, weight, bias, stride, padding, dilation, groups, backend);
}

at::Tensor frozen_convolution(const at::Tensor& x, const at::Tensor& weight, const Maybe& bias,
                              at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                              int64_t groups, std::string_view backend);

struct InputGradient : torch::autograd::Function<InputGradient> {
  static constexpr bool is_traceable = true;  // it only calls ops through the dispatcher

  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight, const Maybe& bias,
                            at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                            std::string_view backend) {
    const at::AutoDispatchBelowAutograd below;
    ctx->save_for_backward({weight});
    ctx->saved_data["size"] = x.sizes();
    ctx->saved_data["strides"] = x.strides();
    ctx->saved_data["stride"] = stride;
    ctx->saved_data["padding"] = padding;
    ctx->saved_data["dilation"] = dilation;
    ctx->saved_data["groups"] = groups;
    ctx->saved_data["backend"] = std::string(backend);
    return convolution_below_autograd(x, weight, bias, stride, padding, dilation, groups, backend);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list gradients(8);
    if (!grads[0].defined()) return gradients;
    const at::Tensor &grad = grads[0], weight = ctx->get_saved_variables()[0];
    auto& saved = ctx->saved_data;
    const auto list = [&](const char* name) { return saved[name].toIntVector(); };
    const auto stride = list("stride"), padding = list("padding"), dilation = list("dilation");
    const int64_t groups = saved["groups"].toInt();
    const std::string backend = saved["backend"].toStringRef();
    // convolution_backward reads only the shape and strides of the input, not its values.
    const at::Tensor like = at::empty_strided(list("size"), list("strides"), grad.options());
    // The backward pass of such a convolution is a convolution with the weight transposed and
    // rotated.
    if (like.suggest_memory_format() == at::MemoryFormat::ChannelsLast &&
        by_winograd(backend, grad, weight.transpose(0, 1), std::nullopt, stride, padding, dilation, groups)) {
      gradients[0] = frozen_convolution(grad, weight.transpose(0, 1).flip({2, 3}), std::nullopt, stride, padding,
                                        dilation, groups, backend);
    } else {
      gradients[0] = std::get<0>(at::convolution_backward(grad, like, weight, std::nullopt, stride, padding, dilation,
                                                          false, {0, 0}, groups, {true, false, false}));
    }
    return gradients;
  }
};

// Whether the tensor has a forward-mode gradient.
bool has_tangent(const at::Tensor& tensor) { return tensor._fw_grad(0).defined(); }

at::Tensor frozen_convolution(const at::Tensor& x, const at::Tensor& weight, const Maybe& bias,
                              at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                              int64_t groups, std::string_view backend) {
  // Our function has no forward-mode derivative.
  if (has_tangent(x) || has_tangent(weight) || (bias && has_tangent(*bias))) {
    return pytorch_convolution(x, weight, bias, stride, padding, dilation, groups, backend);
  }
  if (at::GradMode::is_enabled() && x.requires_grad()) {
    return InputGradient::apply(x, weight, bias, stride, padding, dilation, groups, backend);
  }
  const at::AutoDispatchBelowAutograd below;
  return convolution_below_autograd(x, weight, bias, stride, padding, dilation, groups, backend);
}

TORCH_LIBRARY_FRAGMENT(emd_fast, m) {
  m.def(
      "frozen_convolution(Tensor x, Tensor weight, Tensor? bias, int[2] stride, int[2] padding, int[2] dilation, "
      "int groups, str backend) -> Tensor");
  m.def("winograd(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
}
TORCH_LIBRARY_IMPL(emd_fast, CPU, m) { m.impl("winograd", cpu::winograd); }
TORCH_LIBRARY_IMPL(emd_fast, CompositeExplicitAutograd, m) { m.impl("frozen_convolution", convolution_below_autograd); }
TORCH_LIBRARY_IMPL(emd_fast, Autograd, m) { m.impl("frozen_convolution", frozen_convolution); }

}  // namespace
}  // namespace emd
