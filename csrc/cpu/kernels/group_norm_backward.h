#pragma once

#include "group_norm_channels_last.h"

namespace emd::cpu::EMD_ISA {
namespace {

// Computes inner[i], the gradient with respect to the activation's input, and calls
// function(first, count) after each block. Prefetches the next tile.
template <bool kSilu, class T, class Map, class Function>
inline void inner_gradient(int64_t n, const T* grad, const T* x, float* inner, const Map& map, Function function) {
  for_blocks(n, [=, &map](int64_t first, auto count) __attribute__((always_inline)) {
    __builtin_prefetch(grad + first + kTile);
    __builtin_prefetch(x + first + kTile);
#pragma omp simd
    for (int64_t i = first; i < first + count; i++) {
      inner[i] = group_norm_inner_gradient<kSilu>(to_float(grad[i]), to_float(x[i]), map(kCenter, i), map(kGain, i),
                                                  map(kOffset, i));
    }
    function(first, count);
  });
}

// Continues MapNumbers.
enum GradientNumbers { kSlope = kMapNumbers, kConstant, kGradientNumbers };

template <class T, class Gradient>
inline void gradient_of_x(int64_t n, const float* inner, const T* x, T* out, const Gradient& of) {
  for_blocks(n, [=, &of](int64_t first, auto count) __attribute__((always_inline)) {
#pragma omp simd
    for (int64_t i = first; i < first + count; i++) {
      from_float(group_norm_gradient(inner[i], to_float(x[i]), of(kCenter, i), of(kGain, i), of(kSlope, i),
                                     of(kConstant, i)),
                 out[i]);
    }
  });
}

// Plane k of the sums (3, samples, channels).
inline double* sums_of(const GroupNormBackward& op, int k) {
  return op.sums + k * op.forward.samples * op.forward.channels;
}

// Gradient coefficients of a group, from the sums of its channels. In place, multiplies the sums
// of i (x - center) and of x - center by rstd, which makes them those of i n and n.
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

// Sums of the rows of a part, added row by row.
struct RowSums {
  float inner[RowNumbers<1>::kRows], product[RowNumbers<1>::kRows];
  int64_t row = 0;

  EMD_HD void add(float of_inner, float of_product) {
    inner[row] = of_inner;
    product[row++] = of_product;
  }
};

// Inner gradient of a row, and its sums. Prefetches the destination of the gradient of x too.
template <bool kSilu, class T>
inline void row_sums(int64_t n, int64_t, const T* grad, const T* x, float* inner, const T* out,
                     const Numbers<kMapNumbers>& map, RowSums& sums) {
  alignas(64) float inner_sum[kBlock], product_sum[kBlock];
  const float center = map.value[kCenter];
  inner_gradient<kSilu>(n, grad, x, inner, map, [&](int64_t first, auto count) __attribute__((always_inline)) {
    __builtin_prefetch(out + first);
#pragma omp simd
    for (int64_t j = 0; j < count; j++) {
      add_to_lane(inner_sum, j, first, inner[first + j]);
      add_to_lane(product_sum, j, first, product(inner[first + j], to_float(x[first + j]) - center));
    }
    if (first == 0) {
      clear_lanes_from(inner_sum, count);
      clear_lanes_from(product_sum, count);
    }
  });
  sums.add(sum_of_lanes<kBlock>(inner_sum), sum_of_lanes<kBlock>(product_sum));
}

// The same for several rows of this width in one tile.
template <bool kSilu, class T>
inline void row_sums(int64_t n, int64_t width, const T* grad, const T* x, float* inner, const T* out,
                     const NumbersTile<kMapNumbers>& map, RowSums& sums) {
  inner_gradient<kSilu>(n, grad, x, inner, map, [=](int64_t first, auto) { __builtin_prefetch(out + first); });
  for (int64_t start = 0; start < n; start += width) {
    const float *inner_r = inner + start, center = map(kCenter, start);
    const T* x_r = x + start;
    sums.add(sum<float>(width, [=](int64_t i) { return inner_r[i]; }),
             sum<float>(width, [=](int64_t i) { return product(inner_r[i], to_float(x_r[i]) - center); }));
  }
}

// Adds the sums of a part to the totals of its channels, or stores them if it is the first part of
// a row.
inline void add_to_totals(double* totals, const float* sums, int64_t count, bool continues) {
#pragma omp simd
  for (int64_t r = 0; r < count; r++) totals[r] = (continues ? totals[r] : 0) + double(sums[r]);
}

// Backward pass of items that share a tile. scratch holds the inner gradient, so that the
// exponential is computed once.
template <class T, bool kSilu>
inline void backward_of_items(const GroupNormBackward& op, int64_t begin, int64_t end) {
  const GroupNorm& norm = op.forward;
  const int64_t start0 = begin * norm.group_channels() * norm.positions;
  for_parts<kMapNumbers>(
      norm, begin, end, [&](int64_t row, int64_t count, auto& numbers) { write_maps(norm, row, count, numbers); },
      [&](const Rows& rows, const auto& numbers) {
        const T *grad = static_cast<const T*>(op.grad) + rows.start, *x = static_cast<const T*>(norm.x) + rows.start;
        const T* out = op.grad_x ? static_cast<const T*>(op.grad_x) + rows.start : x;
        float* inner = op.scratch + (rows.start - start0);
        const int64_t width = rows.width();
        RowSums sums;
        for_runs(rows, numbers, [&](int64_t first, int64_t n, const auto& map) {
          row_sums<kSilu>(n, width, grad + first, x + first, inner + first, out + first, map, sums);
        });
        // Whether the previous part has the same row.
        const bool continues = rows.start > rows.first * norm.positions;
        add_to_totals(sums_of(op, 0) + rows.first, sums.inner, rows.count, continues);
        add_to_totals(sums_of(op, 1) + rows.first, sums.product, rows.count, continues);
        if (!op.sums_x) return;
        float centered[RowNumbers<1>::kRows];
        for (int64_t r = 0; r < rows.count; r++) {
          const T* x_r = x + r * width;
          const float center = numbers.data[kCenter][r];
          centered[r] = sum<float>(width, [=](int64_t i) { return to_float(x_r[i]) - center; });
        }
        add_to_totals(sums_of(op, 2) + rows.first, centered, rows.count, continues);
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
        const T* x = static_cast<const T*>(norm.x) + rows.start;
        const float* inner = op.scratch + (rows.start - start0);
        T* out = static_cast<T*>(op.grad_x) + rows.start;
        for_runs(rows, numbers, [&](int64_t first, int64_t n, const auto& of) {
          gradient_of_x(n, inner + first, x + first, out + first, of);
        });
      });
}

void group_norm_backward(const GroupNormBackward& op, int64_t first, int64_t last) {
  const int64_t together = items_together(op.forward);
  with_kind(op.forward, [&](auto element, auto silu) {
    for (int64_t begin = first; begin < last; begin += together) {
      backward_of_items<decltype(element), silu>(op, begin, last - begin < together ? last : begin + together);
    }
  });
}

// channels_last, in passes: the maps of the forward pass; the sums of every channel in every chunk
// of positions; their totals, with the gradient coefficients of each channel; the gradient of x.

inline float* chunk_sums(const GroupNormBackward& op, int64_t item) {
  return op.scratch + item * 3 * op.forward.channels;
}

// Coefficients (samples, 5, channels): center, gain, offset, slope, constant.
inline float* channel_numbers(const GroupNormBackward& op, int64_t sample) {
  const GroupNorm& norm = op.forward;
  return op.scratch + norm.samples * norm.chunks() * 3 * norm.channels + sample * 5 * norm.channels;
}

// op.inner, shifted so that the tensor's element indices of this sample address it.
inline float* inner_of(const GroupNormBackward& op, const Chunk& chunk) {
  return op.inner ? op.inner - chunk.sample * op.forward.positions * op.forward.channels : nullptr;
}

template <class T, bool kSilu, bool kKeepsInner>
inline void chunk_sums_of(const GroupNormBackward& op, int64_t item) {
  const GroupNorm& norm = op.forward;
  const Chunk chunk = chunk_of(norm, item);
  const int64_t channels = norm.channels;
  const float *center = channel_numbers(op, chunk.sample), *gain = center + channels, *offset = gain + channels;
  const T *grad = static_cast<const T*>(op.grad), *x = static_cast<const T*>(norm.x);
  float* inner = inner_of(op, chunk);
  float *inner_sums = chunk_sums(op, item), *product_sums = inner_sums + channels;
  float* centered_sums = product_sums + channels;
  memset(inner_sums, 0, size_t(3 * channels) * sizeof(float));
  for_blocks_of(norm, chunk, [=](int64_t channel, auto count, int64_t start) __attribute__((always_inline)) {
    __builtin_prefetch(grad + start + kTile);
    __builtin_prefetch(x + start + kTile);
#pragma omp simd
    for (int64_t j = 0; j < count; j++) {
      const int64_t c = channel + j;
      const float x_j = to_float(x[start + j]), centered = x_j - center[c];
      const float of_j =
          group_norm_inner_gradient<kSilu>(to_float(grad[start + j]), x_j, center[c], gain[c], offset[c]);
      if (kKeepsInner) inner[start + j] = of_j;
      inner_sums[c] += of_j;
      product_sums[c] += product(of_j, centered);
      centered_sums[c] += centered;
    }
  });
}

void group_norm_backward_sums(const GroupNormBackward& op, int64_t first, int64_t last) {
  with_kind(op.forward, [&](auto element, auto silu) {
    for (int64_t item = first; item < last; item++) {
      op.inner ? chunk_sums_of<decltype(element), silu, true>(op, item)
               : chunk_sums_of<decltype(element), silu, false>(op, item);
    }
  });
}

// Recomputes the maps of the forward pass.
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

template <class T, bool kSilu, bool kKeepsInner>
inline void gradient_of_chunk(const GroupNormBackward& op, int64_t item) {
  const GroupNorm& norm = op.forward;
  const Chunk chunk = chunk_of(norm, item);
  const int64_t channels = norm.channels;
  const float *center = channel_numbers(op, chunk.sample), *gain = center + channels, *offset = gain + channels;
  const float *slope = offset + channels, *constant = slope + channels, *inner = inner_of(op, chunk);
  const T *grad = static_cast<const T*>(op.grad), *x = static_cast<const T*>(norm.x);
  T* out = static_cast<T*>(op.grad_x);
  for_blocks_of(norm, chunk, [=](int64_t channel, auto count, int64_t start) __attribute__((always_inline)) {
#pragma omp simd
    for (int64_t j = 0; j < count; j++) {
      const int64_t c = channel + j;
      const float x_j = to_float(x[start + j]);
      const float of_j =
          kKeepsInner ? inner[start + j]
                      : group_norm_inner_gradient<kSilu>(to_float(grad[start + j]), x_j, center[c], gain[c], offset[c]);
      from_float(group_norm_gradient(of_j, x_j, center[c], gain[c], slope[c], constant[c]), out[start + j]);
    }
  });
}

void group_norm_backward_apply(const GroupNormBackward& op, int64_t first, int64_t last) {
  with_kind(op.forward, [&](auto element, auto silu) {
    for (int64_t item = first; item < last; item++) {
      op.inner ? gradient_of_chunk<decltype(element), silu, true>(op, item)
               : gradient_of_chunk<decltype(element), silu, false>(op, item);
    }
  });
}

}  // namespace
}  // namespace emd::cpu::EMD_ISA
