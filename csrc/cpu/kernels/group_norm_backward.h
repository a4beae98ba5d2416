#pragma once

#include "group_norm.h"

namespace emd::cpu::EMD_ISA {
namespace {

// inner[i]: the gradient before the activation.
template <class Map>
inline void inner_gradient(bool silu, int64_t n, const float* grad, const float* x, float* inner, const Map& map) {
  if (silu) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
      inner[i] = group_norm_inner_gradient<true>(grad[i], x[i], map(kCenter, i), map(kGain, i), map(kOffset, i));
    }
  } else {
    memcpy(inner, grad, size_t(n) * sizeof(float));
  }
}

enum GradientNumbers { kSlope = kMapNumbers, kConstant, kGradientNumbers };  // after those of the map

template <class Gradient>
inline void gradient_of_x(int64_t n, const float* inner, const float* x, float* out, const Gradient& of) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    out[i] = fused(inner[i], of(kGain, i), fused(x[i] - of(kCenter, i), of(kSlope, i), of(kConstant, i)));
  }
}

// sums is (3, samples, channels).
inline double* sums_of(const GroupNormBackward& op, int k) {
  return op.sums + k * op.forward.samples * op.forward.channels;
}

// From the sums of the group's channels.
inline ChannelGradient group_gradient(const GroupNormBackward& op, int64_t item) {
  const GroupNorm& norm = op.forward;
  const int64_t width = norm.group_channels(), channel0 = item % norm.groups * width, row0 = item * width;
  const double *inner = sums_of(op, 0) + row0, *inner_centered = sums_of(op, 1) + row0;
  const double rstd = norm.rstd[item];
  double sum_k = 0, sum_k_normal = 0;
  for (int64_t c = 0; c < width; c++) {
    const double weight = number_or(norm.weight, channel0 + c, 1), scale = number_or(norm.scale, row0 + c, 0);
    const double k = weight * (1.0 + scale);
    sum_k += k * inner[c];
    sum_k_normal += k * inner_centered[c] * rstd;
  }
  return channel_gradient(sum_k, sum_k_normal, rstd, double(width * norm.positions));
}

// scratch holds the inner gradient of the items that share a tile, so that the exponential is taken once.
void group_norm_backward(const GroupNormBackward& op, int64_t first, int64_t last) {
  const GroupNorm& norm = op.forward;
  const int64_t positions = norm.positions, together = items_together(norm);
  for (int64_t begin = first; begin < last; begin += together) {
    const int64_t end = last - begin < together ? last : begin + together;
    const int64_t row0 = begin * norm.group_channels();
    Buffer grad_buffer, x_buffer, out_buffer;
    for_parts(
        norm, begin, end,
        [&](int64_t row, int64_t channel, int64_t item) { return map_of_row(norm, row, channel, item); },
        [&](const Rows& rows, const auto& map) {
          const float* grad = read_row(op.grad, norm.type, rows.start, rows.size, grad_buffer.data);
          const float* x = read_row(norm.x, norm.type, rows.start, rows.size, x_buffer.data);
          float* inner = op.scratch + (rows.start - row0 * positions);
          inner_gradient(norm.silu, rows.size, grad, x, inner, map);
          const int64_t n = rows.size / rows.count;
          const bool first_part = rows.start == rows.first * positions;
          for (int64_t r = 0; r < rows.count; r++) {
            const float *inner_r = inner + r * n, *x_r = x + r * n;
            const float center = map(kCenter, r * n);
            const int64_t row = rows.first + r;
            const float part[3] = {
                sum<float>(n, [=](int64_t i) { return inner_r[i]; }),
                sum<float>(n, [=](int64_t i) { return product(inner_r[i], x_r[i] - center); }),
                op.sums_x ? sum<float>(n, [=](int64_t i) { return x_r[i] - center; }) : 0};
            for (int k = 0; k < 3; k++) {
              double& total = sums_of(op, k)[row];
              total = (first_part ? 0 : total) + double(part[k]);
            }
          }
        });
    if (!op.grad_x) continue;
    ChannelGradient shared = {};
    int64_t of_item = -1;
    for_parts(
        norm, begin, end,
        [&](int64_t row, int64_t channel, int64_t item) -> Numbers<kGradientNumbers> {
          if (item != of_item) shared = group_gradient(op, item);
          of_item = item;
          const Numbers<kMapNumbers> map = map_of_row(norm, row, channel, item);
          return {map.value[kCenter], map.value[kGain], 0, shared.slope, shared.constant};
        },
        [&](const Rows& rows, const auto& of) {
          const float* x = read_row(norm.x, norm.type, rows.start, rows.size, x_buffer.data);
          float* out = begin_row(op.grad_x, norm.type, rows.start, out_buffer.data);
          gradient_of_x(rows.size, op.scratch + (rows.start - row0 * positions), x, out, of);
          finish_row(op.grad_x, norm.type, rows.start, rows.size, out);
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
    const int64_t sample_start = chunk.sample * norm.positions * norm.channels;
    const int64_t together = positions_together(norm);
    for (int64_t channel = 0; channel < norm.channels; channel += kTile) {
      const int64_t rest = norm.channels - channel, channels = rest < kTile ? rest : kTile;
      NumbersTile<kMapNumbers> tile;
      Buffer lanes[3], grad_buffer, x_buffer, inner_buffer;
      for (int k = 0; k < kMapNumbers; k++) repeat(norm, numbers + k * norm.channels + channel, channels, tile.data[k]);
      const float* center = tile.data[kCenter];
      float *inner_sum = lanes[0].data, *product_sum = lanes[1].data, *centered_sum = lanes[2].data;
      for (Buffer& lane : lanes) memset(lane.data, 0, size_t(together * channels) * sizeof(float));
      for (int64_t p = 0; p < chunk.positions; p += together) {
        const int64_t left = chunk.positions - p, n = (left < together ? left : together) * channels;
        const int64_t row = chunk.start + p * norm.channels + channel;
        const float* grad = read_row(op.grad, norm.type, row, n, grad_buffer.data);
        const float* x = read_row(norm.x, norm.type, row, n, x_buffer.data);
        float* inner = op.inner ? op.inner + (row - sample_start) : inner_buffer.data;
        inner_gradient(norm.silu, n, grad, x, inner, tile);
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
      const ChannelMap map = map_of(norm, sample * norm.channels + c, c, norm.mean[group], norm.rstd[group]);
      numbers[c] = map.center;
      numbers[norm.channels + c] = map.gain;
      numbers[2 * norm.channels + c] = map.offset;
    }
  }
}

void group_norm_backward_totals(const GroupNormBackward& op, int64_t first, int64_t last) {
  const GroupNorm& norm = op.forward;
  for (int64_t sample = first; sample < last; sample++) {
    for (int k = 0; k < 3; k++) {
      double* sums = sums_of(op, k) + sample * norm.channels;
      memset(sums, 0, size_t(norm.channels) * sizeof(double));
      for (int64_t chunk = 0; chunk < norm.chunks(); chunk++) {
        const float* part = chunk_sums(op, sample * norm.chunks() + chunk) + k * norm.channels;
#pragma omp simd
        for (int64_t c = 0; c < norm.channels; c++) sums[c] += double(part[c]);
      }
    }
    float* slope = channel_numbers(op, sample) + 3 * norm.channels;
    for (int64_t group = 0; group < norm.groups; group++) {
      const ChannelGradient shared = group_gradient(op, sample * norm.groups + group);
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
    const int64_t sample_start = chunk.sample * norm.positions * norm.channels;
    NumbersTile<kGradientNumbers> tile;
    Buffer grad_buffer, x_buffer, inner_buffer, out_buffer;
    for_parts_of(
        norm, chunk,
        [&](int64_t channel, int64_t channels) {
          for (int k = 0; k < kGradientNumbers; k++) {
            repeat(norm, numbers + k * norm.channels + channel, channels, tile.data[k]);
          }
        },
        [&](const Part& part) {
          const int64_t n = part.size();
          const float* x = read_row(norm.x, norm.type, part.start, n, x_buffer.data);
          float* out = begin_row(op.grad_x, norm.type, part.start, out_buffer.data);
          const float* inner = op.inner + (part.start - sample_start);
          if (!op.inner) {
            const float* grad = read_row(op.grad, norm.type, part.start, n, grad_buffer.data);
            inner_gradient(norm.silu, n, grad, x, inner_buffer.data, tile);
            inner = inner_buffer.data;
          }
          gradient_of_x(n, inner, x, out, tile);
          finish_row(op.grad_x, norm.type, part.start, n, out);
        });
  }
}

}  // namespace
}  // namespace emd::cpu::EMD_ISA
