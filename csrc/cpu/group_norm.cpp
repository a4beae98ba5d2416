#include "group_norm.h"

#include <torch/library.h>

#include "memory.h"

namespace emd::cpu {
namespace {

at::Tensor as_float(const std::optional<at::Tensor>& numbers, at::IntArrayRef size) {
  if (!numbers) return {};
  TORCH_CHECK(numbers->is_cpu() && numbers->sizes() == size, "expected ", size, ", got ", numbers->sizes());
  return numbers->to(at::kFloat).contiguous();
}

}  // namespace

GroupNormInputs::GroupNormInputs(const at::Tensor& input, int64_t num_groups, const std::optional<at::Tensor>& weight_C,
                                 const std::optional<at::Tensor>& bias_C, const std::optional<at::Tensor>& add_BC,
                                 const std::optional<at::Tensor>& scale_BC, const std::optional<at::Tensor>& shift_BC,
                                 bool silu) {
  TORCH_CHECK(input.is_cpu() && input.dim() >= 2 && num_groups > 0 && input.size(1) % num_groups == 0,
              "expected (B, C, ...) with C a multiple of ", num_groups, ", got ", input.sizes());
  const int64_t samples = input.size(0), channels = input.size(1);
  layout = layout_of(input);
  x = input.contiguous(layout);
  weight = as_float(weight_C, {channels});
  bias = as_float(bias_C, {channels});
  add = as_float(add_BC, {samples, channels});
  scale = as_float(scale_BC, {samples, channels});
  shift = as_float(shift_BC, {samples, channels});
  absent = at::empty({2, channels}, at::kFloat);
  float *zeros = absent.mutable_data_ptr<float>(), *ones = zeros + channels;
  std::fill(zeros, ones, 0.0f);
  std::fill(ones, ones + channels, 1.0f);
  const auto per_channel = [&](const at::Tensor& given) {
    return given.defined() ? PerChannel{given.const_data_ptr<float>(), channels} : PerChannel{zeros, 0};
  };
  op.x = x.const_data_ptr();
  op.type = type_of(x.scalar_type());
  op.silu = silu;
  op.samples = samples;
  op.channels = channels;
  op.positions = c10::multiply_integers(x.sizes().slice(2));
  op.groups = num_groups;
  // With one position both layouts are equal, and channels_last has the longer inner loops.
  op.channels_last = layout != at::MemoryFormat::Contiguous || op.positions == 1;
  op.weight = weight.defined() ? weight.const_data_ptr<float>() : ones;
  op.bias = bias.defined() ? bias.const_data_ptr<float>() : zeros;
  op.add = per_channel(add);
  op.scale = per_channel(scale);
  op.shift = per_channel(shift);
}

int64_t grain_of(int64_t elements_of_an_item) {
  return 1 + kGrainElements / (elements_of_an_item + 1);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> group_norm(
    const at::Tensor& input, int64_t num_groups, const std::optional<at::Tensor>& weight,
    const std::optional<at::Tensor>& bias, double eps, const std::optional<at::Tensor>& add,
    const std::optional<at::Tensor>& scale, const std::optional<at::Tensor>& shift, bool silu) {
  GroupNormInputs inputs(input, num_groups, weight, bias, add, scale, shift, silu);
  GroupNorm& op = inputs.op;
  const at::Tensor y = with_huge_pages(at::empty_like(inputs.x, inputs.layout));
  const at::Tensor mean = at::empty({op.samples, op.groups}, at::kFloat), rstd = at::empty_like(mean);
  op.eps = eps;
  op.y = y.mutable_data_ptr();
  op.mean = mean.mutable_data_ptr<float>();
  op.rstd = rstd.mutable_data_ptr<float>();
  if (inputs.x.numel() == 0) return {y, mean.zero_(), rstd.zero_()};
  if (!op.channels_last) {
    in_parallel(op.samples * op.groups, grain_of(op.group_channels() * op.positions), kernels().group_norm, op);
    return {y, mean, rstd};
  }
  const at::Tensor scratch = at::empty({op.samples * (2 * op.chunks() + 3) * op.channels}, at::kFloat);
  op.scratch = scratch.mutable_data_ptr<float>();
  const at::Tensor moments = at::empty({op.samples * 2 * op.channels}, at::kDouble);
  op.moments = moments.mutable_data_ptr<double>();
  run_passes(op, op,
             {{kernels().group_norm_moments, Items::chunks},
              {kernels().group_norm_maps, Items::samples},
              {kernels().group_norm_apply, Items::chunks}},
             [](GroupNorm&, int64_t, int64_t) {});
  return {y, mean, rstd};
}

TORCH_LIBRARY_IMPL(emd_fast_native, CPU, m) { m.impl("group_norm", group_norm); }

}  // namespace emd::cpu
