#include <torch/library.h>

#include <array>

#include "group_norm.h"
#include "memory.h"

namespace emd::cpu {
namespace {

// Accumulators in float64, so that a gradient is rounded once.
at::Tensor gradient_for(bool needed, const std::optional<at::Tensor>& of, const at::Tensor& x) {
  return needed && of ? at::zeros(of->sizes(), at::kDouble) : at::empty({0}, x.options());
}

double* numbers_of(const at::Tensor& gradient) {
  return gradient.scalar_type() == at::kDouble ? gradient.mutable_data_ptr<double>() : nullptr;
}

at::Tensor rounded(const at::Tensor& gradient, const std::optional<at::Tensor>& of) {
  return gradient.scalar_type() == at::kDouble ? gradient.to(of->scalar_type()) : gradient;
}

// Outputs: the gradients of weight (C), bias (C), add, scale and shift (B, C). Null if not needed.
struct ParameterGradients {
  double *weight, *bias, *add, *scale, *shift;

  bool any() const { return weight || bias || add || scale || shift; }
};

// Gradient of add for one group of a sample.
void gradient_of_add(const GroupNormBackward& op, int64_t sample, int64_t group, double* out) {
  const GroupNorm& norm = op.forward;
  const int64_t width = norm.group_channels(), channel = group * width, row = sample * norm.channels + channel;
  const int64_t all = norm.samples * norm.channels;
  const double *inner = op.sums + row, *inner_normal = inner + all, *normal = inner_normal + all;
  const float *weight = norm.weight + channel, *scale = norm.scale.of(sample) + channel;
  const double rstd = norm.rstd[sample * norm.groups + group], elements = double(width * norm.positions);
  double sum_k = 0, sum_k_normal = 0;
  for (int64_t c = 0; c < width; c++) {
    const double k = weight[c] * (1.0 + scale[c]);
    sum_k += k * inner[c];
    sum_k_normal += k * inner_normal[c];
    out[row + c] = rstd * k * inner[c];
  }
  for (int64_t c = 0; c < width; c++) {
    out[row + c] -= rstd * (sum_k * double(norm.positions) + sum_k_normal * normal[c]) / elements;
  }
}

// Gradients for the channels of some groups, in float64, from the sums over positions. Samples are
// added in order.
void parameter_gradients(const GroupNormBackward& op, const ParameterGradients& out, int64_t group,
                         int64_t last_group) {
  const GroupNorm& norm = op.forward;
  const int64_t all = norm.samples * norm.channels;
  const int64_t first = group * norm.group_channels(), last = last_group * norm.group_channels();
  for (int64_t s = 0; s < norm.samples; s++) {
    const int64_t row = s * norm.channels;
    const double *inner = op.sums + row, *inner_normal = inner + all;
    const float* scale = norm.scale.of(s);
    const auto for_channels = [=](auto function) {
#pragma omp simd
      for (int64_t c = first; c < last; c++) function(c);
    };
    if (out.weight) for_channels([=](int64_t c) { out.weight[c] += (1.0 + scale[c]) * inner_normal[c]; });
    if (out.bias) for_channels([=](int64_t c) { out.bias[c] += (1.0 + scale[c]) * inner[c]; });
    if (out.shift) for_channels([=](int64_t c) { out.shift[row + c] = inner[c]; });
    if (out.scale) {
      const float *weight = norm.weight, *bias = norm.bias;
      for_channels([=](int64_t c) { out.scale[row + c] = weight[c] * inner_normal[c] + bias[c] * inner[c]; });
    }
    for (int64_t g = group; out.add && g < last_group; g++) gradient_of_add(op, s, g, out.add);
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
  const at::Tensor grad_x = needs[0] ? with_huge_pages(at::empty_like(x, inputs.layout)) : at::empty({0}, x.options());
  op.grad_x = needs[0] ? grad_x.mutable_data_ptr() : nullptr;
  const at::Tensor sums = at::empty({3, norm.samples, norm.channels}, at::kDouble);
  op.sums = sums.mutable_data_ptr<double>();
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
      // The inner gradient is stored in grad_x itself if that is float32.
      const int64_t size = norm.channels * norm.positions;
      const bool keeps_inner = op.grad_x && by_sample(norm) && size <= kCachedElements;
      const bool in_place = norm.type == Type::float32;
      const at::Tensor kept = at::empty({keeps_inner && !in_place ? at::get_num_threads() : 0, size}, at::kFloat);
      run_passes(op, norm, all, [&](GroupNormBackward& mine, int64_t thread, int64_t sample) {
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
    at::parallel_for(0, norm.groups, grain_of(norm.samples * norm.group_channels()), [&](int64_t first, int64_t last) {
      parameter_gradients(op, out, first, last);
    });
  }
  return {grad_x, rounded(grad_weight, weight), rounded(grad_bias, bias), rounded(grad_add, add),
          rounded(grad_scale, scale), rounded(grad_shift, shift)};
}

TORCH_LIBRARY_IMPL(emd_fast_native, CPU, m) { m.impl("group_norm_backward", group_norm_backward); }

}  // namespace emd::cpu
