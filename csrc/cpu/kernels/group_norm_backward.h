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

// scratch holds the inner gradient of a group, so that the exponential is taken once.
void group_norm_backward(const GroupNormBackward& op, int64_t first, int64_t last) {
  const GroupNorm& norm = op.forward;
  const int64_t width = norm.group_channels(), positions = norm.positions;
  for (int64_t item = first; item < last; item++) {
    const int64_t sample = item / norm.groups, group = item % norm.groups;
    const int64_t start = (sample * norm.channels + group * width) * positions;
    const float mean = norm.mean[item], rstd = norm.rstd[item];
    double* sums = channel_sums(op, sample);
    for (int64_t c = group * width; c < (group + 1) * width; c++) {
      sums[c] = sums[norm.channels + c] = sums[2 * norm.channels + c] = 0;
    }
    Buffer grad_buffer, x_buffer, out_buffer;
    for_parts(norm, sample, group, mean, rstd,
              [&](int64_t channel, int64_t channels, int64_t row, int64_t count, auto center, auto gain, auto offset) {
                const float* grad = read_row(op.grad, norm.type, row, count, grad_buffer.data);
                const float* x = read_row(norm.x, norm.type, row, count, x_buffer.data);
                float* inner = op.scratch + (row - start);
                inner_gradient(norm.silu, count, grad, x, inner, center, gain, offset);
                const int64_t n = count / channels;
                for (int64_t c = 0; c < channels; c++) {
                  const float *inner_c = inner + c * n, *x_c = x + c * n;
                  const float center_c = at(center, c * n);
                  double* sum_c = sums + channel + c;
                  sum_c[0] += double(sum<float>(n, [=](int64_t i) { return inner_c[i]; }));
                  sum_c[norm.channels] +=
                      double(sum<float>(n, [=](int64_t i) { return product(inner_c[i], x_c[i] - center_c); }));
                  if (op.sums_x) {
                    sum_c[2 * norm.channels] += double(sum<float>(n, [=](int64_t i) { return x_c[i] - center_c; }));
                  }
                }
              });
    if (!op.grad_x) continue;
    const ChannelGradient shared = group_gradient(op, sample, group);
    for_parts(norm, sample, group, mean, rstd,
              [&](int64_t, int64_t, int64_t row, int64_t count, auto center, auto gain, auto) {
                const float* x = read_row(norm.x, norm.type, row, count, x_buffer.data);
                float* out = begin_row(op.grad_x, norm.type, row, out_buffer.data);
                gradient_of_x(count, op.scratch + (row - start), x, out, center, gain, shared.slope, shared.constant);
                finish_row(op.grad_x, norm.type, row, count, out);
              });
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
  for (int64_t item = first; item < last; item++) {
    const Chunk chunk = chunk_of(norm, item);
    const float* numbers = channel_numbers(op, chunk.sample);
    float* sums = chunk_sums(op, item);
    const int64_t together = positions_together(norm);
    for (int64_t channel = 0; channel < norm.channels; channel += kTile) {
      const int64_t rest = norm.channels - channel, channels = rest < kTile ? rest : kTile;
      MapTile tile;
      Buffer lanes[3], grad_buffer, x_buffer, inner_buffer;
      repeat(norm, numbers + channel, channels, tile.center);
      repeat(norm, numbers + norm.channels + channel, channels, tile.gain);
      repeat(norm, numbers + 2 * norm.channels + channel, channels, tile.offset);
      const float *center = tile.center, *gain = tile.gain, *offset = tile.offset;
      float *inner_sum = lanes[0].data, *product_sum = lanes[1].data, *centered_sum = lanes[2].data;
      for (Buffer& lane : lanes) memset(lane.data, 0, size_t(together * channels) * sizeof(float));
      for (int64_t p = 0; p < chunk.positions; p += together) {
        const int64_t left = chunk.positions - p, n = (left < together ? left : together) * channels;
        const int64_t row = chunk.start + p * norm.channels + channel;
        const float* grad = read_row(op.grad, norm.type, row, n, grad_buffer.data);
        const float* x = read_row(norm.x, norm.type, row, n, x_buffer.data);
        float* inner = op.keeps_inner ? static_cast<float*>(op.grad_x) + row : inner_buffer.data;
        inner_gradient(norm.silu, n, grad, x, inner, center, gain, offset);
#pragma omp simd
        for (int64_t i = 0; i < n; i++) {
          const float centered = x[i] - center[i];
          inner_sum[i] += inner[i];
          product_sum[i] += product(inner[i], centered);
          centered_sum[i] += centered;
        }
      }
      for (int k = 0; k < 3; k++) fold(norm, lanes[k], channels, sums + k * norm.channels + channel);
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
  for (int64_t item = first; item < last; item++) {
    const Chunk chunk = chunk_of(norm, item);
    const float* numbers = channel_numbers(op, chunk.sample);
    Buffer tile[5], grad_buffer, x_buffer, inner_buffer, out_buffer;
    for_parts_of(
        norm, chunk,
        [&](int64_t channel, int64_t channels) {
          for (int k = 0; k < 5; k++) repeat(norm, numbers + k * norm.channels + channel, channels, tile[k].data);
        },
        [&](const Part& part) {
          const float *center = tile[0].data, *gain = tile[1].data, *offset = tile[2].data;
          const float *slope = tile[3].data, *constant = tile[4].data;
          const int64_t n = part.size();
          const float* x = read_row(norm.x, norm.type, part.start, n, x_buffer.data);
          float* out = begin_row(op.grad_x, norm.type, part.start, out_buffer.data);
          const float* inner = out;
          if (!op.keeps_inner) {
            const float* grad = read_row(op.grad, norm.type, part.start, n, grad_buffer.data);
            inner_gradient(norm.silu, n, grad, x, inner_buffer.data, center, gain, offset);
            inner = inner_buffer.data;
          }
          gradient_of_x(n, inner, x, out, center, gain, slope, constant);
          finish_row(op.grad_x, norm.type, part.start, n, out);
        });
  }
}

}  // namespace
}  // namespace emd::cpu::EMD_ISA
