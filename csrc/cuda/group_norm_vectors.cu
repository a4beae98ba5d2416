// Gradients of weight, bias, add, scale and shift, from the sums over positions of the backward
// pass. The sums of parts and samples are added in a fixed order.
#include "group_norm.cuh"

namespace emd::cuda {
namespace {

constexpr int kVectorThreads = 128;

__device__ void store(const Gradient& gradient, int64_t at, float value) {
  switch (gradient.type) {
    case Type::float32: from_float(value, static_cast<float*>(gradient.data)[at]); break;
    case Type::bfloat16: from_float(value, static_cast<Bfloat16*>(gradient.data)[at]); break;
    case Type::float16: from_float(value, static_cast<Float16*>(gradient.data)[at]); break;
  }
}

struct Sums {
  float inner, product, normal;
};

// Sums over the parts of a sample.
__device__ Sums sums_of(const GroupNormVectors& op, int64_t sample, uint32_t channel) {
  const int64_t channels = op.forward.channels;
  const float* at = op.sums + sample * op.parts * 3 * channels + channel;
  Sums all = {0, 0, 0};
  for (uint32_t part = 0; part < op.parts; part++, at += 3 * channels) {
    all.inner += at[0];
    all.product += at[channels];
    if (op.add.data) all.normal += at[2 * channels];
  }
  return all;
}

__device__ float slope_of(const GroupNorm& norm, int64_t sample, uint32_t channel) {
  return number_of(norm.weight, sample, channel, 1.0f) * (1.0f + number_of(norm.scale, sample, channel, 0.0f));
}

// One warp for a group of a sample: gradients of add, scale and shift.
__global__ void __launch_bounds__(kVectorThreads) vectors_kernel(const __grid_constant__ GroupNormVectors op) {
  const GroupNorm& norm = op.forward;
  const int64_t group = int64_t(blockIdx.x) * (kVectorThreads / 32) + threadIdx.x / 32;
  if (group >= norm.samples * norm.groups) return;
  const int64_t sample = group / norm.groups;
  const uint32_t width = norm.width(), first = uint32_t(group - sample * norm.groups) * width;
  float sum_k = 0, sum_k_normal = 0;
  if (op.add.data) {
    for (uint32_t c = threadIdx.x % 32; c < width; c += 32) {
      const Sums sums = sums_of(op, sample, first + c);
      const float slope = slope_of(norm, sample, first + c);
      sum_k = fused(slope, sums.inner, sum_k);
      sum_k_normal = fused(slope, sums.product, sum_k_normal);
    }
    sum_k = warp_sum(sum_k);
    sum_k_normal = warp_sum(sum_k_normal);
  }
  for (uint32_t c = threadIdx.x % 32; c < width; c += 32) {
    const Sums sums = sums_of(op, sample, first + c);
    const int64_t at = sample * norm.channels + first + c;
    if (op.shift.data) store(op.shift, at, sums.inner);
    if (op.scale.data) {
      const float weight = number_of(norm.weight, sample, first + c, 1.0f);
      const float bias = number_of(norm.bias, sample, first + c, 0.0f);
      store(op.scale, at, fused(weight, sums.product, product(bias, sums.inner)));
    }
    if (op.add.data) {
      const float means = fused(sum_k_normal / norm.elements(), sums.normal, sum_k / float(width));
      store(op.add, at, norm.rstd[group] * (slope_of(norm, sample, first + c) * sums.inner - means));
    }
  }
}

// One warp for a channel: gradients of weight and bias. Its lanes take samples and parts in turn.
__global__ void __launch_bounds__(kVectorThreads) parameters_kernel(const __grid_constant__ GroupNormVectors op) {
  const GroupNorm& norm = op.forward;
  const int64_t channel = int64_t(blockIdx.x) * (kVectorThreads / 32) + threadIdx.x / 32;
  if (channel >= norm.channels) return;
  float inner = 0, product = 0;
  for (int64_t row = threadIdx.x % 32; row < norm.samples * op.parts; row += 32) {
    const float* at = op.sums + row * 3 * norm.channels + channel;
    const float factor = 1.0f + number_of(norm.scale, row / op.parts, uint32_t(channel), 0.0f);
    inner = fused(factor, at[0], inner);
    product = fused(factor, at[norm.channels], product);
  }
  inner = warp_sum(inner);
  product = warp_sum(product);
  if (threadIdx.x % 32) return;
  if (op.weight.data) store(op.weight, channel, product);
  if (op.bias.data) store(op.bias, channel, inner);
}

}  // namespace

void run(const GroupNormVectors& op, Stream stream) {
  constexpr int64_t kTogether = kVectorThreads / 32;
  const int64_t groups = op.forward.samples * op.forward.groups;
  if (op.add.data || op.scale.data || op.shift.data) {
    launch(vectors_kernel, (groups + kTogether - 1) / kTogether, kVectorThreads, stream, op);
  }
  if (op.weight.data || op.bias.data) {
    launch(parameters_kernel, (op.forward.channels + kTogether - 1) / kTogether, kVectorThreads, stream, op);
  }
}

}  // namespace emd::cuda
