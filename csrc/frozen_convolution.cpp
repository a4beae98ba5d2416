// The convolution of emd_fast/fusion/convolution.py without its Python, which costs a small call more time than the
// convolution: autograd keeps the weight alone. Below autograd it is PyTorch's on any device, or, where that serves, the
// CPU's by Winograd's algorithm.
#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "cpu/winograd.h"

namespace emd {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Maybe = std::optional<at::Tensor>;

// Once this is loaded, "auto" is "cpu".
bool by_winograd(std::string_view backend, const at::Tensor& x, const at::Tensor& weight, const Maybe& bias,
                 at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  return (backend == "auto" || backend == "cpu") &&
         cpu::winograd_serves(x, weight, bias, stride, padding, dilation, groups);
}

// Through the dispatcher, where modes see it.
at::Tensor winograd(const at::Tensor& x, const at::Tensor& weight, const Maybe& bias) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("emd_fast::winograd", "").typed<decltype(winograd)>();
  return op.call(x, weight, bias);
}

at::Tensor pytorch_convolution(const at::Tensor& x, const at::Tensor& weight, const Maybe& bias, at::IntArrayRef stride,
                    at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, std::string_view) {
  // And not conv2d, which is made of this: below autograd a dispatch mode would see that name, and count no FLOPs.
  return at::convolution(x, weight, bias, stride, padding, dilation, false, {0, 0}, groups);
}

at::Tensor convolution_below_autograd(const at::Tensor& x, const at::Tensor& weight, const Maybe& bias, at::IntArrayRef stride,
                          at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, std::string_view backend) {
  return by_winograd(backend, x, weight, bias, stride, padding, dilation, groups)
             ? winograd(x, weight, bias)
             : pytorch_convolution(x, weight, bias, stride, padding, dilation, groups, backend);
}

at::Tensor frozen_convolution(const at::Tensor& x, const at::Tensor& weight, const Maybe& bias, at::IntArrayRef stride,
                     at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, std::string_view backend);

struct InputGradient : torch::autograd::Function<InputGradient> {
  static constexpr bool is_traceable = true;  // it calls ops of the dispatcher alone

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
    // Shape and strides of the input are what is asked for; its numbers are not read.
    const at::Tensor like = at::empty_strided(list("size"), list("strides"), grad.options());
    // Such a convolution backward is one of the weight with its channels exchanged and its pixels turned.
    if (like.suggest_memory_format() == at::MemoryFormat::ChannelsLast &&
        by_winograd(backend, grad, weight.transpose(0, 1), std::nullopt, stride, padding, dilation, groups)) {
      gradients[0] = frozen_convolution(grad, weight.transpose(0, 1).flip({2, 3}), std::nullopt, stride, padding, dilation,
                               groups, backend);
    } else {
      gradients[0] = std::get<0>(at::convolution_backward(grad, like, weight, std::nullopt, stride, padding, dilation,
                                                          false, {0, 0}, groups, {true, false, false}));
    }
    return gradients;
  }
};

// Whether a derivative forwards is asked for by it.
bool has_tangent(const at::Tensor& tensor) { return tensor._fw_grad(0).defined(); }

at::Tensor frozen_convolution(const at::Tensor& x, const at::Tensor& weight, const Maybe& bias, at::IntArrayRef stride,
                     at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, std::string_view backend) {
  // Ours has no derivative forwards.
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
