#include <torch/library.h>

#include <array>

#include "group_norm.h"
#include "memory.h"

namespace emd::cpu {
namespace {

at::Tensor gradient_for(bool needed, const std::optional<at::Tensor>& of, const at::Tensor& x) {
  return needed && of ? at::empty(of->sizes(), of->options()) : at::empty({0}, x.options());
}

// The gradients of weight, bias, add, scale and shift from the sums over positions, in float64, samples in order.
struct ParameterGradients {
  std::vector<double> weight, bias, add, scale, shift;
};

ParameterGradients parameter_gradients(const GroupNormBackward& op) {
  const GroupNorm& norm = op.forward;
  const int64_t channels = norm.channels, width = norm.group_channels(), all = norm.samples * channels;
  ParameterGradients out;
  out.weight.resize(channels);
  out.bias.resize(channels);
  out.add.resize(all);
  out.scale.resize(all);
  out.shift.resize(all);
  for (int64_t s = 0; s < norm.samples; s++) {
    const double* sums = op.sums + s * 3 * channels;
    for (int64_t g = 0; g < norm.groups; g++) {
      const double rstd = norm.rstd[s * norm.groups + g];
      double sum_k = 0, sum_k_normal = 0;
      for (int64_t c = g * width; c < (g + 1) * width; c++) {
        const int64_t i = s * channels + c;
        const double weight = norm.weight ? norm.weight[c] : 1, bias = norm.bias ? norm.bias[c] : 0;
        const double gain = norm.scale ? 1.0 + norm.scale[i] : 1;
        const double inner = sums[c], inner_normal = sums[channels + c] * rstd;
        out.weight[c] += gain * inner_normal;
        out.bias[c] += gain * inner;
        out.scale[i] = weight * inner_normal + bias * inner;
        out.shift[i] = inner;
        sum_k += weight * gain * inner;
        sum_k_normal += weight * gain * inner_normal;
        out.add[i] = rstd * weight * gain * inner;
      }
      const double elements = double(width * norm.positions);
      for (int64_t c = g * width; c < (g + 1) * width; c++) {
        const double normal = sums[2 * channels + c] * rstd;
        out.add[s * channels + c] -=
            rstd * (sum_k * double(norm.positions) + sum_k_normal * normal) / elements;
      }
    }
  }
  return out;
}

void copy_to(const at::Tensor& gradient, std::vector<double>& values) {
  if (gradient.numel() == 0) return;
  gradient.copy_(at::from_blob(values.data(), gradient.sizes(), at::kDouble));
}

using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Gradients group_norm_backward(const at::Tensor& grad, const at::Tensor& input, const at::Tensor& mean,
                              const at::Tensor& rstd, int64_t num_groups, const std::optional<at::Tensor>& weight,
                              const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& add,
                              const std::optional<at::Tensor>& scale, const std::optional<at::Tensor>& shift,
                              bool silu, std::array<bool, 6> needs) {
  GroupNormInputs inputs(input, num_groups, weight, bias, add, scale, shift, silu);
  GroupNormBackward op = {};
  op.forward = inputs.op;
  GroupNorm& norm = op.forward;
  const at::Tensor& x = inputs.x;
  const std::vector<int64_t> moments = {norm.samples, norm.groups};
  TORCH_CHECK(grad.sizes() == x.sizes() && mean.sizes() == moments && rstd.sizes() == moments,
              "expected a gradient like x and moments of ", moments);
  const at::Tensor means = mean.to(at::kFloat).contiguous(), rstds = rstd.to(at::kFloat).contiguous();
  norm.mean = means.mutable_data_ptr<float>();
  norm.rstd = rstds.mutable_data_ptr<float>();
  const at::Tensor like_x = grad.to(x.scalar_type()).contiguous(inputs.layout);
  op.grad = like_x.const_data_ptr();
  const at::Tensor grad_x = needs[0] ? fresh(at::empty_like(x, inputs.layout)) : at::empty({0}, x.options());
  op.grad_x = needs[0] ? grad_x.mutable_data_ptr() : nullptr;
  std::vector<double> sums(size_t(norm.samples * 3 * norm.channels));
  op.sums = sums.data();
  op.sums_x = needs[3];
  if (x.numel() > 0) {
    if (!norm.channels_last) {
      const int64_t size = norm.group_channels() * norm.positions;
      const at::Tensor scratch = at::empty({at::get_num_threads(), size}, at::kFloat);
      at::parallel_for(0, norm.samples * norm.groups, grain_of(size), [&](int64_t first, int64_t last) {
        GroupNormBackward mine = op;
        mine.scratch = scratch.mutable_data_ptr<float>() + at::get_thread_num() * size;
        kernels().group_norm_backward(mine, first, last);
      });
    } else {
      const at::Tensor scratch = at::empty({norm.samples * (3 * norm.chunks() + 5) * norm.channels}, at::kFloat);
      op.scratch = scratch.mutable_data_ptr<float>();
      std::vector<Pass<GroupNormBackward>> all = {{kernels().group_norm_backward_maps, Items::samples},
                                                  {kernels().group_norm_backward_sums, Items::chunks},
                                                  {kernels().group_norm_backward_totals, Items::samples}};
      // Where a sample stays in the cache until its last pass.
      op.keeps_inner = op.grad_x && norm.type == Type::float32 && by_sample(norm) &&
                       norm.channels * norm.positions <= kCachedElements;
      if (op.grad_x) all.push_back({kernels().group_norm_backward_apply, Items::chunks});
      passes(op, norm, all);
    }
  }
  const at::Tensor grad_weight = gradient_for(needs[1], weight, x), grad_bias = gradient_for(needs[2], bias, x);
  const at::Tensor grad_add = gradient_for(needs[3], add, x), grad_scale = gradient_for(needs[4], scale, x);
  const at::Tensor grad_shift = gradient_for(needs[5], shift, x);
  if (needs[1] || needs[2] || needs[3] || needs[4] || needs[5]) {
    ParameterGradients gradients = parameter_gradients(op);
    copy_to(grad_weight, gradients.weight);
    copy_to(grad_bias, gradients.bias);
    copy_to(grad_add, gradients.add);
    copy_to(grad_scale, gradients.scale);
    copy_to(grad_shift, gradients.shift);
  }
  return {grad_x, grad_weight, grad_bias, grad_add, grad_scale, grad_shift};
}

TORCH_LIBRARY_IMPL(emd_fast_native, CPU, m) { m.impl("group_norm_backward", group_norm_backward); }

}  // namespace
}  // namespace emd::cpu
