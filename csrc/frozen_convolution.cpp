// The convolution of emd_fast/unet/convolution.py without its Python, which costs a small call more time than the
// convolution: autograd keeps the weight alone. Registered for autograd only, under which it is PyTorch's convolution,
// on any device.
#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace emd {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Maybe = std::optional<at::Tensor>;

at::Tensor plain(const at::Tensor& x, const at::Tensor& weight, const Maybe& bias, at::IntArrayRef stride,
                 at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  // And not conv2d, which is made of this: below autograd a dispatch mode would see that name, and count no FLOPs.
  return at::convolution(x, weight, bias, stride, padding, dilation, false, {0, 0}, groups);
}

struct ToInput : torch::autograd::Function<ToInput> {
  static constexpr bool is_traceable = true;  // it calls ops of the dispatcher alone

  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight, const Maybe& bias,
                            at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
    const at::AutoDispatchBelowAutograd below;
    ctx->save_for_backward({weight});
    ctx->saved_data["size"] = x.sizes();
    ctx->saved_data["strides"] = x.strides();
    ctx->saved_data["stride"] = stride;
    ctx->saved_data["padding"] = padding;
    ctx->saved_data["dilation"] = dilation;
    ctx->saved_data["groups"] = groups;
    return plain(x, weight, bias, stride, padding, dilation, groups);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list gradients(7);
    if (!grads[0].defined()) return gradients;
    const at::Tensor &grad = grads[0], weight = ctx->get_saved_variables()[0];
    auto& saved = ctx->saved_data;
    const auto list = [&](const char* name) { return saved[name].toIntVector(); };
    // Shape and strides of the input are what is asked for; its numbers are not read.
    const at::Tensor like = at::empty_strided(list("size"), list("strides"), grad.options());
    gradients[0] = std::get<0>(at::convolution_backward(grad, like, weight, std::nullopt, list("stride"),
                                                        list("padding"), list("dilation"), false, {0, 0},
                                                        saved["groups"].toInt(), {true, false, false}));
    return gradients;
  }
};

at::Tensor with_derivative(const at::Tensor& x, const at::Tensor& weight, const Maybe& bias, at::IntArrayRef stride,
                           at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  return ToInput::apply(x, weight, bias, stride, padding, dilation, groups);
}

TORCH_LIBRARY_FRAGMENT(emd_fast, m) {
  m.def(
      "frozen_convolution(Tensor x, Tensor weight, Tensor? bias, int[2] stride, int[2] padding, int[2] dilation, "
      "int groups) -> Tensor");
}
TORCH_LIBRARY_IMPL(emd_fast, CompositeExplicitAutograd, m) { m.impl("frozen_convolution", plain); }
TORCH_LIBRARY_IMPL(emd_fast, Autograd, m) { m.impl("frozen_convolution", with_derivative); }

}  // namespace
}  // namespace emd
