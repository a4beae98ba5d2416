#include "group_norm.h"

#include "devices.h"

#if defined(EMD_CUDA)
#include "../cuda/group_norm.h"

namespace emd {
namespace {

using cuda::Gradient;
using cuda::PerChannel;
using Maybe = std::optional<at::Tensor>;

// x in the layout of the kernels, and their arguments.
struct Inputs {
  at::Tensor x;
  at::MemoryFormat layout;
  Call call;
  cuda::GroupNorm op = {};

  Inputs(const at::Tensor& given, int64_t groups, const Maybe& weight, const Maybe& bias, const Maybe& add,
         const Maybe& scale, const Maybe& shift, bool silu)
      : call(given) {
    TORCH_CHECK(given.dim() >= 2 && groups > 0 && given.size(1) % groups == 0,
                "expected (B, C, ...) with C a multiple of ", groups, ", got ", given.sizes());
    TORCH_CHECK(has_channels_last(given), "expected a channels_last tensor");
    layout = layout_of(given);
    x = given.contiguous(layout);
    const int64_t samples = x.size(0), channels = x.size(1), positions = c10::multiply_integers(x.sizes().slice(2));
    TORCH_CHECK(channels < INT32_MAX && positions < INT32_MAX, "expected fewer channels and positions, got ",
                x.sizes());
    op.x = x.const_data_ptr();
    op.type = type_of(x.scalar_type());
    op.silu = silu;
    op.samples = samples;
    op.positions = uint32_t(positions);
    op.channels = uint32_t(channels);
    op.groups = uint32_t(groups);
    op.weight = per_channel(weight, {channels});
    op.bias = per_channel(bias, {channels});
    op.add = per_channel(add, {samples, channels});
    op.scale = per_channel(scale, {samples, channels});
    op.shift = per_channel(shift, {samples, channels});
  }

  PerChannel per_channel(const Maybe& given, at::IntArrayRef size) const {
    if (!given) return {};
    call.check(*given);
    TORCH_CHECK(given->sizes() == size, "expected ", size, ", got ", given->sizes());
    return {given->const_data_ptr(), type_of(given->scalar_type()), size.size() == 1 ? 0 : given->stride(0),
            given->stride(-1)};
  }

  at::Tensor numbers(at::IntArrayRef size) const { return at::empty(size, x.options().dtype(at::kFloat)); }
};

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> cuda_group_norm(const at::Tensor& x, int64_t num_groups,
                                                               const Maybe& weight, const Maybe& bias, double eps,
                                                               const Maybe& add, const Maybe& scale, const Maybe& shift,
                                                               bool silu) {
  Inputs inputs(x, num_groups, weight, bias, add, scale, shift, silu);
  cuda::GroupNorm& op = inputs.op;
  const at::Tensor y = at::empty_like(inputs.x, inputs.layout);
  const at::Tensor mean = inputs.numbers({op.samples, num_groups}), rstd = at::empty_like(mean);
  if (inputs.x.numel() == 0) return {y, mean.zero_(), rstd.zero_()};
  op.eps = float(eps);
  op.y = y.mutable_data_ptr();
  op.mean = mean.mutable_data_ptr<float>();
  op.rstd = rstd.mutable_data_ptr<float>();
  cuda::Cuda::on_device(inputs.call, [&](cuda::Stream stream) {
    const cuda::NormTile tile = tile_of(op);
    at::Tensor scratch;
    if (!tile.resident) {
      scratch = inputs.numbers({op.samples, tile.parts, op.channels, 2});
      op.scratch = scratch.mutable_data_ptr<float>();
    }
    cuda::run(op, tile, stream);
  });
  return {y, mean, rstd};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> cuda_group_norm_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& mean, const at::Tensor& rstd, int64_t num_groups,
    const Maybe& weight, const Maybe& bias, const Maybe& add, const Maybe& scale, const Maybe& shift, bool silu,
    std::array<bool, 6> needs) {
  Inputs inputs(x, num_groups, weight, bias, add, scale, shift, silu);
  const at::Tensor none = at::empty({0}, x.options());
  const bool empty = inputs.x.numel() == 0;
  const at::Tensor grad_x = needs[0] ? at::empty_like(inputs.x, inputs.layout) : none;
  bool of_vectors = false;
  const auto gradient_of = [&](const Maybe& of, bool needed) {
    if (!needed || !of) return none;
    of_vectors = true;
    return empty ? at::zeros(of->sizes(), of->options()) : at::empty(of->sizes(), of->options());
  };
  const at::Tensor grad_weight = gradient_of(weight, needs[1]), grad_bias = gradient_of(bias, needs[2]);
  const at::Tensor grad_add = gradient_of(add, needs[3]), grad_scale = gradient_of(scale, needs[4]);
  const at::Tensor grad_shift = gradient_of(shift, needs[5]);
  if (!empty && (needs[0] || of_vectors)) {
    TORCH_CHECK(grad.sizes() == x.sizes() && grad.scalar_type() == x.scalar_type(), "expected a gradient like x, got ",
                grad.sizes(), " ", grad.scalar_type());
    inputs.call.check(grad);
    const at::Tensor dense_grad = grad.contiguous(inputs.layout);
    cuda::GroupNormBackward op = {};
    op.forward = inputs.op;
    cuda::GroupNorm& norm = op.forward;
    const at::Tensor dense_mean = mean.contiguous(), dense_rstd = rstd.contiguous();
    norm.mean = const_cast<float*>(dense_mean.const_data_ptr<float>());
    norm.rstd = const_cast<float*>(dense_rstd.const_data_ptr<float>());
    op.grad = dense_grad.const_data_ptr();
    op.grad_x = needs[0] ? grad_x.mutable_data_ptr() : nullptr;
    op.sums_x = grad_add.numel() > 0;
    cuda::Cuda::on_device(inputs.call, [&](cuda::Stream stream) {
      const cuda::NormTile tile = tile_of(op);
      at::Tensor sums, scratch;
      if (of_vectors || !tile.resident) {
        sums = inputs.numbers({norm.samples, tile.parts, 3, norm.channels});
        op.sums = sums.mutable_data_ptr<float>();
      }
      if (!tile.resident) {
        scratch = inputs.numbers({norm.samples, norm.groups, 2});
        op.scratch = scratch.mutable_data_ptr<float>();
      }
      cuda::run(op, tile, stream);
      if (!of_vectors) return;
      const auto written = [](const at::Tensor& gradient) {
        return gradient.numel() ? Gradient{gradient.mutable_data_ptr(), type_of(gradient.scalar_type())} : Gradient{};
      };
      cuda::run(cuda::GroupNormVectors{norm, op.sums, tile.parts, written(grad_weight), written(grad_bias),
                                       written(grad_add), written(grad_scale), written(grad_shift)},
                stream);
    });
  }
  return {grad_x, grad_weight, grad_bias, grad_add, grad_scale, grad_shift};
}

namespace {

template <class Device>
void add_group_norm(torch::Library& library) {
  library.impl("group_norm", cuda_group_norm);
  library.impl("group_norm_backward", cuda_group_norm_backward);
}

EMD_REGISTER_CUDA(add_group_norm)

}  // namespace
}  // namespace emd

#endif
