#pragma once

#include "group_norm.h"

namespace emd::cpu::EMD_ISA {
namespace {

// inner[i]: the gradient before the activation.
template <class Center, class Gain, class Offset>
inline void inner_gradient(bool silu, int64_t n, const float* grad, const float* x, float* inner, Center center,
                           Gain gain, Offset offset) {
  if (silu) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
      inner[i] = group_norm_inner_gradient<true>(grad[i], x[i], at(center, i), at(gain, i), at(offset, i));
    }
  } else {
    memcpy(inner, grad, size_t(n) * sizeof(float));
  }
}

template <class Center, class Gain, class Slope, class Constant>
inline void gradient_of_x(int64_t n, const float* inner, const float* x, float* out, Center center, Gain gain,
                          Slope slope, Constant constant) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    out[i] = fused(inner[i], at(gain, i), fused(x[i] - at(center, i), at(slope, i), at(constant, i)));
  }
}

// sums is (samples, 3, channels).
inline double* channel_sums(const GroupNormBackward& op, int64_t sample) {
  return op.sums + sample * 3 * op.forward.channels;
}

// From the sums of the group's channels.
inline ChannelGradient group_gradient(const GroupNormBackward& op, int64_t sample, int64_t group) {
  const GroupNorm& norm = op.forward;
  const int64_t width = norm.group_channels();
  const double* sums = channel_sums(op, sample);
  const double rstd = norm.rstd[sample * norm.groups + group];
  double sum_k = 0, sum_k_normal = 0;
  for (int64_t c = group * width; c < (group + 1) * width; c++) {
    const double k = double(number_or(norm.weight, c, 1)) *
                     (1.0 + double(number_or(norm.scale, sample * norm.channels + c, 0)));
    sum_k += k * sums[c];
    sum_k_normal += k * sums[norm.channels + c] * rstd;
  }
  return channel_gradient(sum_k, sum_k_normal, rstd, double(width * norm.positions));
}

void group_norm_backward(const GroupNormBackward& op, int64_t first, int64_t last) {
  const GroupNorm& norm = op.forward;
  const int64_t width = norm.group_channels(), positions = norm.positions;
  for (int64_t item = first; item < last; item++) {
    const int64_t sample = item / norm.groups, group = item % norm.groups;
    const float mean = norm.mean[item], rstd = norm.rstd[item];
    double* sums = channel_sums(op, sample);
    Buffer grad_buffer, x_buffer, inner_buffer, out_buffer;
    float* inner = inner_buffer.data;
    for (int64_t c = group * width; c < (group + 1) * width; c++) {
      const ChannelMap map = map_of(norm, sample, c, mean, rstd);
      double inner_sum = 0, product_sum = 0, centered_sum = 0;
      for (int64_t done = 0; done < positions; done += kTile) {
        const int64_t count = positions - done < kTile ? positions - done : kTile;
        const int64_t row = (sample * norm.channels + c) * positions + done;
        const float* grad = read_row(op.grad, norm.type, row, count, grad_buffer.data);
        const float* x = read_row(norm.x, norm.type, row, count, x_buffer.data);
        inner_gradient(norm.silu, count, grad, x, inner, map.center, map.gain, map.offset);
        const float center = map.center;
        inner_sum += double(sum<float>(count, [=](int64_t i) { return inner[i]; }));
        product_sum += double(sum<float>(count, [=](int64_t i) { return product(inner[i], x[i] - center); }));
        centered_sum += double(sum<float>(count, [=](int64_t i) { return x[i] - center; }));
      }
      sums[c] = inner_sum;
      sums[norm.channels + c] = product_sum;
      sums[2 * norm.channels + c] = centered_sum;
    }
    if (!op.grad_x) continue;
    const ChannelGradient shared = group_gradient(op, sample, group);
    for (int64_t c = group * width; c < (group + 1) * width; c++) {
      const ChannelMap map = map_of(norm, sample, c, mean, rstd);
      for (int64_t done = 0; done < positions; done += kTile) {
        const int64_t count = positions - done < kTile ? positions - done : kTile;
        const int64_t row = (sample * norm.channels + c) * positions + done;
        const float* grad = read_row(op.grad, norm.type, row, count, grad_buffer.data);
        const float* x = read_row(norm.x, norm.type, row, count, x_buffer.data);
        inner_gradient(norm.silu, count, grad, x, inner, map.center, map.gain, map.offset);
        float* out = begin_row(op.grad_x, norm.type, row, out_buffer.data);
        gradient_of_x(count, inner, x, out, map.center, map.gain, shared.slope, shared.constant);
        finish_row(op.grad_x, norm.type, row, count, out);
      }
    }
  }
}

// Channels last: the sums of every channel in every chunk of positions; their totals, and with them what the gradient
// of x needs of each channel; the gradient of x.

inline float* chunk_sums(const GroupNormBackward& op, int64_t item) {
  return op.scratch + item * 3 * op.forward.channels;
}

// (samples, 5, channels): center, gain, offset, slope, constant.
inline float* channel_numbers(const GroupNormBackward& op, int64_t sample) {
  const GroupNorm& norm = op.forward;
  return op.scratch + norm.samples * norm.chunks() * 3 * norm.channels + sample * 5 * norm.channels;
}

void group_norm_backward_sums(const GroupNormBackward& op, int64_t first, int64_t last) {
  const GroupNorm& norm = op.forward;
  const int64_t channels = norm.channels;
  for (int64_t item = first; item < last; item++) {
    const Chunk chunk = chunk_of(norm, item);
    const float* numbers = channel_numbers(op, chunk.sample);
    float* sums = chunk_sums(op, item);
    memset(sums, 0, size_t(3 * channels) * sizeof(float));
    Buffer grad_buffer, x_buffer, inner_buffer;
    for (int64_t p = 0; p < chunk.positions; p++) {
      for (int64_t c0 = 0; c0 < channels; c0 += kTile) {
        const int64_t width = channels - c0 < kTile ? channels - c0 : kTile, row = chunk.start + p * channels + c0;
        const float* grad = read_row(op.grad, norm.type, row, width, grad_buffer.data);
        const float* x = read_row(norm.x, norm.type, row, width, x_buffer.data);
        const float* center = numbers + c0;
        float* inner = inner_buffer.data;
        inner_gradient(norm.silu, width, grad, x, inner, center, center + channels, center + 2 * channels);
        float *inner_sum = sums + c0, *product_sum = inner_sum + channels, *centered_sum = product_sum + channels;
#pragma omp simd
        for (int64_t c = 0; c < width; c++) {
          const float centered = x[c] - center[c];
          inner_sum[c] += inner[c];
          product_sum[c] += product(inner[c], centered);
          centered_sum[c] += centered;
        }
      }
    }
  }
}

// The maps of the forward pass, again.
void group_norm_backward_maps(const GroupNormBackward& op, int64_t first, int64_t last) {
  const GroupNorm& norm = op.forward;
  for (int64_t sample = first; sample < last; sample++) {
    float* numbers = channel_numbers(op, sample);
    for (int64_t c = 0; c < norm.channels; c++) {
      const int64_t group = sample * norm.groups + c / norm.group_channels();
      const ChannelMap map = map_of(norm, sample, c, norm.mean[group], norm.rstd[group]);
      numbers[c] = map.center;
      numbers[norm.channels + c] = map.gain;
      numbers[2 * norm.channels + c] = map.offset;
    }
  }
}

void group_norm_backward_totals(const GroupNormBackward& op, int64_t first, int64_t last) {
  const GroupNorm& norm = op.forward;
  for (int64_t sample = first; sample < last; sample++) {
    double* sums = channel_sums(op, sample);
    for (int64_t i = 0; i < 3 * norm.channels; i++) sums[i] = 0;
    for (int64_t k = 0; k < norm.chunks(); k++) {
      const float* part = chunk_sums(op, sample * norm.chunks() + k);
#pragma omp simd
      for (int64_t i = 0; i < 3 * norm.channels; i++) sums[i] += double(part[i]);
    }
    float* slope = channel_numbers(op, sample) + 3 * norm.channels;
    for (int64_t group = 0; group < norm.groups; group++) {
      const ChannelGradient shared = group_gradient(op, sample, group);
      for (int64_t c = group * norm.group_channels(); c < (group + 1) * norm.group_channels(); c++) {
        slope[c] = shared.slope;
        slope[norm.channels + c] = shared.constant;
      }
    }
  }
}

void group_norm_backward_apply(const GroupNormBackward& op, int64_t first, int64_t last) {
  const GroupNorm& norm = op.forward;
  const int64_t channels = norm.channels;
  for (int64_t item = first; item < last; item++) {
    const Chunk chunk = chunk_of(norm, item);
    const float* numbers = channel_numbers(op, chunk.sample);
    Buffer grad_buffer, x_buffer, inner_buffer, out_buffer;
    for (int64_t p = 0; p < chunk.positions; p++) {
      for (int64_t c0 = 0; c0 < channels; c0 += kTile) {
        const int64_t width = channels - c0 < kTile ? channels - c0 : kTile, row = chunk.start + p * channels + c0;
        const float* grad = read_row(op.grad, norm.type, row, width, grad_buffer.data);
        const float* x = read_row(norm.x, norm.type, row, width, x_buffer.data);
        const float *center = numbers + c0, *gain = center + channels, *offset = gain + channels;
        const float *slope = offset + channels, *constant = slope + channels;
        inner_gradient(norm.silu, width, grad, x, inner_buffer.data, center, gain, offset);
        float* out = begin_row(op.grad_x, norm.type, row, out_buffer.data);
        gradient_of_x(width, inner_buffer.data, x, out, center, gain, slope, constant);
        finish_row(op.grad_x, norm.type, row, width, out);
      }
    }
  }
}

}  // namespace
}  // namespace emd::cpu::EMD_ISA
