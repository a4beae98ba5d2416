#pragma once

#include "group_norm.h"

namespace emd::cpu::EMD_ISA {
namespace {

// inner[i], the gradient before the activation; then function(first, count) for its block.
template <bool kSilu, class Map, class Function>
inline void inner_gradient(int64_t n, const float* grad, const float* x, float* inner, const Map& map,
                           Function function) {
  for_blocks(n, [=, &map](int64_t first, auto count) __attribute__((always_inline)) {
#pragma omp simd
    for (int64_t i = first; i < first + count; i++) {
      inner[i] = group_norm_inner_gradient<kSilu>(grad[i], x[i], map(kCenter, i), map(kGain, i), map(kOffset, i));
    }
    function(first, count);
  });
}

template <class Map, class Function>
inline void inner_gradient(bool silu, int64_t n, const float* grad, const float* x, float* inner, const Map& map,
                           Function function) {
  silu ? inner_gradient<true>(n, grad, x, inner, map, function)
       : inner_gradient<false>(n, grad, x, inner, map, function);
}

enum GradientNumbers { kSlope = kMapNumbers, kConstant, kGradientNumbers };  // after those of the map

template <class Gradient>
inline void gradient_of_x(int64_t n, const float* inner, const float* x, float* out, const Gradient& of) {
  for_blocks(n, [=, &of](int64_t first, auto count) __attribute__((always_inline)) {
#pragma omp simd
    for (int64_t i = first; i < first + count; i++) {
      out[i] = fused(inner[i], of(kGain, i), fused(x[i] - of(kCenter, i), of(kSlope, i), of(kConstant, i)));
    }
  });
}

// sums is (3, samples, channels).
inline double* sums_of(const GroupNormBackward& op, int k) {
  return op.sums + k * op.forward.samples * op.forward.channels;
}

// From the sums of the group's channels, of which it makes those of i n those of i (x - center).
inline ChannelGradient group_gradient(const GroupNormBackward& op, int64_t sample, int64_t group) {
  const GroupNorm& norm = op.forward;
  const int64_t width = norm.group_channels(), channel0 = group * width, row0 = sample * norm.channels + channel0;
  double *inner = sums_of(op, 0) + row0, *inner_normal = sums_of(op, 1) + row0, *normal = sums_of(op, 2) + row0;
  const float *weight = norm.weight + channel0, *scale = norm.scale.of(sample) + channel0;
  const double rstd = norm.rstd[sample * norm.groups + group];
  double sum_k = 0, sum_k_normal = 0;
  for (int64_t c = 0; c < width; c++) {
    const double k = double(weight[c]) * (1.0 + double(scale[c]));
    inner_normal[c] *= rstd;
    if (op.sums_x) normal[c] *= rstd;
    sum_k += k * inner[c];
    sum_k_normal += k * inner_normal[c];
  }
  return channel_gradient(sum_k, sum_k_normal, rstd, double(width * norm.positions));
}

// Of a run of a part.
struct Gradients {
  const float *grad, *x;
  float* inner;
};

// The inner gradient of a row and its sums.
inline void row_sums(bool silu, const Gradients& of, int64_t n, int64_t, const Numbers<kMapNumbers>& map,
                     float (*sums)[2]) {
  alignas(64) float inner_sum[kBlock], product_sum[kBlock];
  const float center = map.value[kCenter], *inner = of.inner, *x = of.x;
  inner_gradient(silu, n, of.grad, x, of.inner, map, [&](int64_t first, auto count) __attribute__((always_inline)) {
#pragma omp simd
    for (int64_t j = 0; j < count; j++) {
      add_to_lane(inner_sum, j, first, inner[first + j]);
      add_to_lane(product_sum, j, first, product(inner[first + j], x[first + j] - center));
    }
    if (first == 0) {
      clear_lanes_from(inner_sum, count);
      clear_lanes_from(product_sum, count);
    }
  });
  sums[0][0] = sum_of_lanes<kBlock>(inner_sum);
  sums[0][1] = sum_of_lanes<kBlock>(product_sum);
}

// Of rows of a width that share a tile.
inline void row_sums(bool silu, const Gradients& of, int64_t n, int64_t width, const NumbersTile<kMapNumbers>& map,
                     float (*sums)[2]) {
  inner_gradient(silu, n, of.grad, of.x, of.inner, map, [](int64_t, auto) {});
  for (int64_t start = 0; start < n; start += width, sums++) {
    const float *inner = of.inner + start, *x = of.x + start, center = map(kCenter, start);
    sums[0][0] = sum<float>(width, [=](int64_t i) { return inner[i]; });
    sums[0][1] = sum<float>(width, [=](int64_t i) { return product(inner[i], x[i] - center); });
  }
}

// Of items that are taken together: scratch holds their inner gradient, so that the exponential is taken once.
inline void backward_of_items(const GroupNormBackward& op, int64_t begin, int64_t end) {
  const GroupNorm& norm = op.forward;
  const int64_t start0 = begin * norm.group_channels() * norm.positions;
  for_parts<kMapNumbers>(
      norm, begin, end, [&](int64_t row, int64_t count, auto& numbers) { write_maps(norm, row, count, numbers); },
      [&](const Rows& rows, const auto& numbers) {
        Buffer grad_buffer, x_buffer;
        const float* grad = read_row(op.grad, norm.type, rows.start, rows.size, grad_buffer.data);
        const float* x = read_row(norm.x, norm.type, rows.start, rows.size, x_buffer.data);
        float *inner = op.scratch + (rows.start - start0), parts[RowNumbers<1>::kRows][2], (*sums)[2] = parts;
        const int64_t width = rows.width();
        for_runs(rows, numbers, [&](int64_t first, int64_t n, const auto& map) {
          row_sums(norm.silu, {grad + first, x + first, inner + first}, n, width, map, sums);
          sums += n / width;
        });
        const bool continues = rows.start > rows.first * norm.positions;  // the row of the part before
        for (int64_t r = 0; r < rows.count; r++) {
          const float center = numbers.data[kCenter][r], *x_r = x + r * width;
          const float part[3] = {parts[r][0], parts[r][1],
                                 op.sums_x ? sum<float>(width, [=](int64_t i) { return x_r[i] - center; }) : 0};
          for (int k = 0; k < 3; k++) {
            double& total = sums_of(op, k)[rows.first + r];
            total = (continues ? total : 0) + double(part[k]);
          }
        }
      });
  ChannelGradient shared[kTile];
  for (int64_t item = begin; item < end; item++) {
    const int64_t sample = item / norm.groups;
    shared[item - begin] = group_gradient(op, sample, item - sample * norm.groups);
  }
  if (!op.grad_x) return;
  for_parts<kGradientNumbers>(
      norm, begin, end,
      [&](int64_t row, int64_t count, auto& numbers) {
        write_maps(norm, row, count, numbers);
        for_items_of(norm, row, count, [&](int64_t r, int64_t item) {
          numbers.data[kSlope][r] = shared[item - begin].slope;
          numbers.data[kConstant][r] = shared[item - begin].constant;
        });
      },
      [&](const Rows& rows, const auto& numbers) {
        Buffer x_buffer, out_buffer;
        const float *x = read_row(norm.x, norm.type, rows.start, rows.size, x_buffer.data);
        const float* inner = op.scratch + (rows.start - start0);
        float* out = begin_row(op.grad_x, norm.type, rows.start, out_buffer.data);
        for_runs(rows, numbers, [&](int64_t first, int64_t n, const auto& of) {
          gradient_of_x(n, inner + first, x + first, out + first, of);
        });
        finish_row(op.grad_x, norm.type, rows.start, rows.size, out);
      });
}

void group_norm_backward(const GroupNormBackward& op, int64_t first, int64_t last) {
  const int64_t together = items_together(op.forward);
  for (int64_t begin = first; begin < last; begin += together) {
    backward_of_items(op, begin, last - begin < together ? last : begin + together);
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
        const auto add = [=](int64_t first, auto count) __attribute__((always_inline)) {
#pragma omp simd
          for (int64_t i = first; i < first + count; i++) {
            const float centered = x[i] - center[i];
            inner_sum[i] += inner[i];
            product_sum[i] += product(inner[i], centered);
            centered_sum[i] += centered;
          }
        };
        inner_gradient(norm.silu, n, grad, x, inner, tile, add);
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
    for (int64_t g = 0; g < norm.groups; g++) {
      const float mean = norm.mean[sample * norm.groups + g], rstd = norm.rstd[sample * norm.groups + g];
#pragma omp simd
      for (int64_t c = g * norm.group_channels(); c < (g + 1) * norm.group_channels(); c++) {
        const ChannelMap map = map_of(norm, sample, c, mean, rstd);
        numbers[c] = map.center;
        numbers[norm.channels + c] = map.gain;
        numbers[2 * norm.channels + c] = map.offset;
      }
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
            inner_gradient(norm.silu, n, grad, x, inner_buffer.data, tile, [](int64_t, auto) {});
            inner = inner_buffer.data;
          }
          gradient_of_x(n, inner, x, out, tile);
          finish_row(op.grad_x, norm.type, part.start, n, out);
        });
  }
}

}  // namespace
}  // namespace emd::cpu::EMD_ISA
