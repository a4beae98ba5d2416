// group_norm in the contiguous layout, and what both layouts share.
#pragma once

#include <math.h>

#include "../../core/group_norm.h"
#include "sums.h"
#include "tile.h"

namespace emd::cpu::EMD_ISA {
namespace {

// Calls function(a value of the element type, Constant<whether there is an activation>).
template <class Function>
inline void with_kind(const GroupNorm& op, Function function) {
  with_type(op.type, [&](auto element) {
    op.silu ? function(element, Constant<true>()) : function(element, Constant<false>());
  });
}

// Count, mean and sum of squared deviations. E[x^2] - E[x]^2 would cancel where the mean is large.
struct Moments {
  double n, mean, squares;
};

// Moments of the union of two sets (Chan, Golub, LeVeque, 1979).
EMD_HD Moments merged(const Moments& a, const Moments& b) {
  const double n = a.n + b.n, difference = b.mean - a.mean;
  return {n, a.mean + difference * (b.n / n), a.squares + b.squares + difference * difference * (a.n * b.n / n)};
}

// Moments of at most one tile.
template <class T>
inline Moments tile_moments(const T* x, int64_t n) {
  const float mean = sum<float>(n, [=](int64_t i) { return to_float(x[i]); }) / float(n);
  const auto square = [=](int64_t i) {
    const float apart = to_float(x[i]) - mean;
    return product(apart, apart);
  };
  return {double(n), double(mean), double(sum<float>(n, square))};
}

// Moments of n contiguous numbers, tile by tile: each tile is read once from memory and twice from
// cache.
template <class T>
inline Moments dense_moments(const T* x, int64_t n) {
  Moments all = {0, 0, 0};
  for (int64_t done = 0; done < n; done += kTile) {
    const Moments part = tile_moments(x + done, n - done < kTile ? n - done : kTile);
    all = done == 0 ? part : merged(all, part);
  }
  return all;
}

// Affine map of a channel of a sample, from the mean and rstd of its group.
EMD_HD ChannelMap map_of(const GroupNorm& op, int64_t sample, int64_t channel, float mean, float rstd) {
  return channel_map(mean, rstd, op.weight[channel], op.bias[channel], op.add.of(sample)[channel],
                     op.scale.of(sample)[channel], op.shift.of(sample)[channel]);
}

inline float rstd_of(const Moments& group, double eps) { return float(1.0 / sqrt(group.squares / group.n + eps)); }

// kCount coefficients of a channel, for the loops over its elements. Numbers holds one set for all
// elements. NumbersTile, for a tile of several channels, holds one set per element.
template <int kCount>
struct Numbers {
  float value[kCount];

  EMD_HD float operator()(int k, int64_t) const { return value[k]; }
};

template <int kCount>
struct alignas(64) NumbersTile {
  static constexpr int64_t kVector = 16;
  float data[kCount][kTile + kVector];  // padded for the last vector of write()

  EMD_HD float operator()(int k, int64_t i) const { return data[k][i]; }

  // Writes whole vectors. Call it in order of `at`: a call overwrites the excess of the previous
  // one.
  void write(int64_t at, int64_t n, const Numbers<kCount>& numbers) {
    for (int64_t i = at; i < at + n; i += kVector) {
      for (int k = 0; k < kCount; k++) {
#pragma omp simd
        for (int64_t j = i; j < i + kVector; j++) data[k][j] = numbers.value[k];
      }
    }
  }
};

enum MapNumbers { kCenter, kGain, kOffset, kMapNumbers };

// Applies the map to n elements. Prefetches the elements at `prefetch_distance`. An address past
// the end is harmless, since a prefetch never faults.
template <bool kSilu, class T, class Map>
inline void apply_map(int64_t n, const T* x, T* y, const Map& map, int64_t prefetch_distance) {
  for_blocks(n, [=, &map](int64_t first, auto count) __attribute__((always_inline)) {
    __builtin_prefetch(x + first + prefetch_distance);
#pragma omp simd
    for (int64_t i = first; i < first + count; i++) {
      from_float(emd::group_norm<kSilu>(to_float(x[i]), map(kCenter, i), map(kGain, i), map(kOffset, i)), y[i]);
    }
  });
}

// Contiguous layout (channels before positions). A row holds the positions of one channel of one
// sample. An item holds the rows of one group of one sample. Elements are processed in parts of at
// most one tile: a part of one row, or several whole rows.

struct Rows {
  int64_t first, count, start, size;  // start of their elements in the tensor

  EMD_HD int64_t width() const { return size / count; }
};

// Number of items that fit into one tile, at least 1.
inline int64_t items_together(const GroupNorm& op) {
  const int64_t together = kTile / (op.group_channels() * op.positions);
  return together > 1 ? together : 1;
}

// Coefficients of the rows of a part. They are computed for all rows first, so that the loop
// vectorizes.
template <int kCount>
struct RowNumbers {
  static constexpr int64_t kRows = 64;
  float data[kCount][kRows];

  EMD_HD Numbers<kCount> of(int64_t r) const {
    Numbers<kCount> numbers;
    for (int k = 0; k < kCount; k++) numbers.value[k] = data[k][r];
    return numbers;
  }
};

// Calls function(r, item) for `count` rows from `row` on.
template <class Function>
inline void for_items_of(const GroupNorm& op, int64_t row, int64_t count, Function function) {
  const int64_t width = op.group_channels();
  int64_t item = row / width, of_item = row - item * width;
  for (int64_t r = 0; r < count; r++) {
    function(r, item);
    if (++of_item == width) of_item = 0, item++;
  }
}

template <int kCount>
inline void write_maps(const GroupNorm& op, int64_t row, int64_t count, RowNumbers<kCount>& numbers) {
  float *center = numbers.data[kCenter], *gain = numbers.data[kGain], *offset = numbers.data[kOffset];
  for_items_of(op, row, count, [&](int64_t r, int64_t item) {
    center[r] = op.mean[item];
    gain[r] = op.rstd[item];
  });
  int64_t sample = row / op.channels, channel = row - sample * op.channels;
  for (int64_t r = 0; r < count; sample++, channel = 0) {
    const int64_t end = count - r < op.channels - channel ? count : r + op.channels - channel;
    const int64_t shift_of_rows = channel - r;
    const float *weight = op.weight + shift_of_rows, *bias = op.bias + shift_of_rows;
    const float* add = op.add.of(sample) + shift_of_rows;
    const float *scale = op.scale.of(sample) + shift_of_rows, *shift = op.shift.of(sample) + shift_of_rows;
#pragma omp simd
    for (int64_t i = r; i < end; i++) {
      const ChannelMap map = channel_map(center[i], gain[i], weight[i], bias[i], add[i], scale[i], shift[i]);
      center[i] = map.center;
      gain[i] = map.gain;
      offset[i] = map.offset;
    }
    r = end;
  }
}

// Calls function(rows, numbers) for each part of items first to last - 1. write(row, count,
// numbers) computes the coefficients.
template <int kCount, class Write, class Function>
inline void for_parts(const GroupNorm& op, int64_t first, int64_t last, Write write, Function function) {
  const int64_t positions = op.positions, end = last * op.group_channels(), most = RowNumbers<kCount>::kRows;
  const int64_t fitting = positions < kTile ? kTile / positions : 1, together = fitting < most ? fitting : most;
  RowNumbers<kCount> numbers;
  for (int64_t row = first * op.group_channels(); row < end; row += together) {
    const int64_t count = end - row < together ? end - row : together, size = count * positions;
    write(row, count, numbers);
    for (int64_t done = 0; done < size; done += kTile) {
      const int64_t rest = size - done;
      function(Rows{row, count, row * positions + done, rest < kTile ? rest : kTile}, numbers);
    }
  }
}

// Calls function(first, n, numbers) for each row of a part, or once for all rows if they are short
// and would leave vectors unfilled.
template <int kCount, class Function>
inline void for_runs(const Rows& rows, const RowNumbers<kCount>& numbers, Function function) {
  const int64_t n = rows.width();
  if (n >= 4 * kBlock || n % kBlock == 0) {
    for (int64_t r = 0; r < rows.count; r++) function(r * n, n, numbers.of(r));
  } else {
    NumbersTile<kCount> tile;
    for (int64_t r = 0; r < rows.count; r++) tile.write(r * n, n, numbers.of(r));
    function(0, rows.size, tile);
  }
}

template <class T>
inline Moments item_moments(const GroupNorm& op, int64_t item) {
  const int64_t width = op.group_channels(), positions = op.positions, row0 = item * width;
  const T* x = static_cast<const T*>(op.x) + row0 * positions;
  if (op.add.shared()) return dense_moments(x, width * positions);
  const int64_t sample = item / op.groups;
  const float* add = op.add.of(sample) + (row0 - sample * op.channels);
  Moments group = {0, 0, 0};
  for (int64_t c = 0; c < width; c++) {
    Moments channel = dense_moments(x + c * positions, positions);
    channel.mean += double(add[c]);
    group = c == 0 ? channel : merged(group, channel);
  }
  return group;
}

// Moments of the items that share a tile, equal to those of item_moments. Each step runs over all
// items, so that the processor starts the next sum before the previous one ends.
template <class T>
inline void moments_of_tile(const GroupNorm& op, int64_t begin, int64_t end) {
  const int64_t items = end - begin, n = op.group_channels() * op.positions;
  float squares[kTile];
  const T* x = static_cast<const T*>(op.x) + begin * n;
  float *mean = op.mean + begin, *rstd = op.rstd + begin;
  for (int64_t g = 0; g < items; g++) {
    mean[g] = sum<float>(n, [=](int64_t i) { return to_float(x[g * n + i]); }) / float(n);
  }
  for (int64_t g = 0; g < items; g++) {
    const float center = mean[g];
    squares[g] = sum<float>(n, [=](int64_t i) {
      const float apart = to_float(x[g * n + i]) - center;
      return product(apart, apart);
    });
  }
#pragma omp simd
  for (int64_t g = 0; g < items; g++) rstd[g] = rstd_of({double(n), 0, double(squares[g])}, op.eps);
}

// In most networks an item is still in the cache when it is read again. The next item is
// prefetched meanwhile.
template <class T, bool kSilu>
inline void group_norm_rows(const GroupNorm& op, int64_t first, int64_t last) {
  const int64_t together = items_together(op);
  for (int64_t begin = first; begin < last; begin += together) {
    const int64_t end = last - begin < together ? last : begin + together;
    if (together > 1 && op.add.shared()) {
      moments_of_tile<T>(op, begin, end);
    } else {
      for (int64_t item = begin; item < end; item++) {
        const Moments group = item_moments<T>(op, item);
        op.mean[item] = float(group.mean);
        op.rstd[item] = rstd_of(group, op.eps);
      }
    }
    const int64_t size = (end - begin) * op.group_channels() * op.positions;
    for_parts<kMapNumbers>(
        op, begin, end, [&](int64_t row, int64_t count, auto& numbers) { write_maps(op, row, count, numbers); },
        [&](const Rows& rows, const auto& numbers) {
          const T* x = static_cast<const T*>(op.x) + rows.start;
          T* y = static_cast<T*>(op.y) + rows.start;
          for_runs(rows, numbers, [&](int64_t first, int64_t n, const auto& map) {
            apply_map<kSilu>(n, x + first, y + first, map, size);
          });
        });
  }
}

void group_norm(const GroupNorm& op, int64_t first, int64_t last) {
  with_kind(op, [&](auto element, auto silu) { group_norm_rows<decltype(element), silu>(op, first, last); });
}

}  // namespace
}  // namespace emd::cpu::EMD_ISA
