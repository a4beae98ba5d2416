#include <torch/library.h>

#include <array>

#include "group_norm.h"
#include "memory.h"

namespace emd::cpu {
namespace {

// float64, to be rounded once.
at::Tensor gradient_for(bool needed, const std::optional<at::Tensor>& of, const at::Tensor& x) {
  return needed && of ? at::zeros(of->sizes(), at::kDouble) : at::empty({0}, x.options());
}

double* numbers_of(const at::Tensor& gradient) {
  return gradient.scalar_type() == at::kDouble ? gradient.mutable_data_ptr<double>() : nullptr;
}

at::Tensor rounded(const at::Tensor& gradient, const std::optional<at::Tensor>& of) {
  return gradient.scalar_type() == at::kDouble ? gradient.to(of->scalar_type()) : gradient;
}

// Where the gradients of weight (C), bias (C), add, scale and shift (B, C) go; null where not needed.
struct ParameterGradients {
  double *weight, *bias, *add, *scale, *shift;

  bool any() const { return weight || bias || add || scale || shift; }
};

// From the sums over positions, in float64, samples in order.
void parameter_gradients(const GroupNormBackward& op, const ParameterGradients& out, int64_t group) {
  const GroupNorm& norm = op.forward;
  const int64_t width = norm.group_channels(), all = norm.samples * norm.channels;
  const double elements = double(width * norm.positions);
  for (int64_t s = 0; s < norm.samples; s++) {
    const double rstd = norm.rstd[s * norm.groups + group];
    double sum_k = 0, sum_k_normal = 0;
    for (int64_t c = group * width; c < (group + 1) * width; c++) {
      const int64_t i = s * norm.channels + c;
      const double weight = norm.weight ? norm.weight[c] : 1, bias = norm.bias ? norm.bias[c] : 0;
      const double gain = norm.scale ? 1.0 + norm.scale[i] : 1;
      const double inner = op.sums[i], inner_normal = op.sums[all + i] * rstd;
      if (out.weight) out.weight[c] = (s > 0 ? out.weight[c] : 0) + gain * inner_normal;
      if (out.bias) out.bias[c] = (s > 0 ? out.bias[c] : 0) + gain * inner;
      if (out.scale) out.scale[i] = weight * inner_normal + bias * inner;
      if (out.shift) out.shift[i] = inner;
      if (out.add) out.add[i] = rstd * weight * gain * inner;
      sum_k += weight * gain * inner;
      sum_k_normal += weight * gain * inner_normal;
    }
    if (!out.add) continue;
    for (int64_t c = group * width; c < (group + 1) * width; c++) {
      const int64_t i = s * norm.channels + c;
      const double normal = op.sums[2 * all + i] * rstd;
      out.add[i] -= rstd * (sum_k * double(norm.positions) + sum_k_normal * normal) / elements;
    }
  }
}

}  // namespace

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
      const int64_t size = norm.group_channels() * norm.positions, room = std::max(size, kTile);
      const at::Tensor scratch = at::empty({at::get_num_threads(), room}, at::kFloat);
      at::parallel_for(0, norm.samples * norm.groups, grain_of(size), [&](int64_t first, int64_t last) {
        GroupNormBackward mine = op;
        mine.scratch = scratch.mutable_data_ptr<float>() + at::get_thread_num() * room;
        kernels().group_norm_backward(mine, first, last);
      });
    } else {
      const at::Tensor scratch = at::empty({norm.samples * (3 * norm.chunks() + 5) * norm.channels}, at::kFloat);
      op.scratch = scratch.mutable_data_ptr<float>();
      std::vector<Pass<GroupNormBackward>> all = {{kernels().group_norm_backward_maps, Items::samples},
                                                  {kernels().group_norm_backward_sums, Items::chunks},
                                                  {kernels().group_norm_backward_totals, Items::samples}};
      if (op.grad_x) all.push_back({kernels().group_norm_backward_apply, Items::chunks});
      // In grad_x itself where that is float32.
      const int64_t size = norm.channels * norm.positions;
      const bool keeps_inner = op.grad_x && by_sample(norm) && size <= kCachedElements;
      const bool in_place = norm.type == Type::float32;
      const at::Tensor kept = at::empty({keeps_inner && !in_place ? at::get_num_threads() : 0, size}, at::kFloat);
      passes(op, norm, all, [&](GroupNormBackward& mine, int64_t thread, int64_t sample) {
        if (!keeps_inner) return;
        mine.inner = in_place ? static_cast<float*>(op.grad_x) + sample * size
                              : kept.mutable_data_ptr<float>() + thread * size;
      });
    }
  }
  const at::Tensor grad_weight = gradient_for(needs[1], weight, x), grad_bias = gradient_for(needs[2], bias, x);
  const at::Tensor grad_add = gradient_for(needs[3], add, x), grad_scale = gradient_for(needs[4], scale, x);
  const at::Tensor grad_shift = gradient_for(needs[5], shift, x);
  const ParameterGradients out = {numbers_of(grad_weight), numbers_of(grad_bias), numbers_of(grad_add),
                                  numbers_of(grad_scale), numbers_of(grad_shift)};
  if (out.any() && x.numel() > 0) {
    at::parallel_for(0, norm.groups, grain_of(norm.samples * norm.group_channels() * 16),
                     [&](int64_t first, int64_t last) {
                       for (int64_t group = first; group < last; group++) parameter_gradients(op, out, group);
                     });
  }
  return {grad_x, rounded(grad_weight, weight), rounded(grad_bias, bias), rounded(grad_add, add),
          rounded(grad_scale, scale), rounded(grad_shift, shift)};
}

TORCH_LIBRARY_IMPL(emd_fast_native, CPU, m) { m.impl("group_norm_backward", group_norm_backward); }

}  // namespace emd::cpu
