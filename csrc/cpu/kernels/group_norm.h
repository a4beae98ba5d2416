#pragma once

#include <math.h>

#include "../../core/group_norm.h"
#include "sums.h"
#include "tile.h"

namespace emd::cpu::EMD_ISA {
namespace {

// Calls function(a value of the type of the elements, whether there is an activation, as a type).
template <class Function>
inline void with_kind(const GroupNorm& op, Function function) {
  with_type(op.type, [&](auto element) {
    op.silu ? function(element, Constant<true>()) : function(element, Constant<false>());
  });
}

// Mean and sum of squared deviations of n numbers. Never E[x^2] - E[x]^2, which cancels where the mean is large.
struct Moments {
  double n, mean, squares;
};

// Chan, Golub, LeVeque (1979).
EMD_HD Moments merged(const Moments& a, const Moments& b) {
  const double n = a.n + b.n, difference = b.mean - a.mean;
  return {n, a.mean + difference * (b.n / n), a.squares + b.squares + difference * difference * (a.n * b.n / n)};
}

// Of at most a tile.
template <class T>
inline Moments tile_moments(const T* x, int64_t n) {
  const float mean = sum<float>(n, [=](int64_t i) { return to_float(x[i]); }) / float(n);
  const auto square = [=](int64_t i) {
    const float apart = to_float(x[i]) - mean;
    return product(apart, apart);
  };
  return {double(n), double(mean), double(sum<float>(n, square))};
}

// Part by part in the cache: each read once from memory, and twice from there.
template <class T>
inline Moments dense_moments(const T* x, int64_t n) {
  Moments all = {0, 0, 0};
  for (int64_t done = 0; done < n; done += kTile) {
    const Moments part = tile_moments(x + done, n - done < kTile ? n - done : kTile);
    all = done == 0 ? part : merged(all, part);
  }
  return all;
}

// Of a channel of a sample, with the moments of its group.
EMD_HD ChannelMap map_of(const GroupNorm& op, int64_t sample, int64_t channel, float mean, float rstd) {
  return channel_map(mean, rstd, op.weight[channel], op.bias[channel], op.add.of(sample)[channel],
                     op.scale.of(sample)[channel], op.shift.of(sample)[channel]);
}

inline float rstd_of(const Moments& group, double eps) { return float(1.0 / sqrt(group.squares / group.n + eps)); }

// The numbers of a channel of a sample that its elements need: the same for all of them, or, in a tile of several
// channels, one entry of each per element.
template <int kCount>
struct Numbers {
  float value[kCount];

  EMD_HD float operator()(int k, int64_t) const { return value[k]; }
};

template <int kCount>
struct alignas(64) NumbersTile {
  static constexpr int64_t kVector = 16;
  float data[kCount][kTile + kVector];  // room for the last vector of write

  EMD_HD float operator()(int k, int64_t i) const { return data[k][i]; }

  // In order, and in whole vectors: each writes over what the one before wrote too much.
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

// y[i] from x[i]. Asks memory for what lies `prefetch_distance` elements behind it, to be read while others are computed: an address
// behind the end is harmless, a prefetch never faults.
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

// Channels before positions. A row is the positions of one channel of one sample, an item the rows of one group of one
// sample. Elements are taken in parts of at most a tile: of one row, or of several whole ones.

struct Rows {
  int64_t first, count, start, size;  // start of their elements in the tensor

  EMD_HD int64_t width() const { return size / count; }
};

// Items that are taken together: they fit a tile.
inline int64_t items_together(const GroupNorm& op) {
  const int64_t together = kTile / (op.group_channels() * op.positions);
  return together > 1 ? together : 1;
}

// The numbers of the rows of a part, found before any of them is used: their loop over channels is one of vectors.
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

// Calls function(r, item) for count rows from row on.
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

// Calls function(rows, numbers) for the parts of items first to last - 1; write(row, count, numbers) finds the numbers.
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

// Calls function(first, n, numbers) for the rows of a part one by one, or, where rows are short and would leave blocks
// unfilled, for all at once.
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

// Of the items that share a tile, the same numbers as item_moments: step by step for all of them, so that the processor
// need not wait for the end of one sum before it starts the next.
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

// Items are small enough in most networks to be in the cache still when they are read again; meanwhile the next comes
// from memory.
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

// Channels last, in three passes: the moments of every channel in every chunk of positions; from them the moments of
// groups and the maps of channels; the maps applied.

struct Chunk {
  int64_t sample, positions, start;  // start of its elements in the tensor
};

inline Chunk chunk_of(const GroupNorm& op, int64_t item) {
  const int64_t sample = item / op.chunks(), position = item % op.chunks() * op.chunk();
  const int64_t rest = op.positions - position;
  return {sample, rest < op.chunk() ? rest : op.chunk(), (sample * op.positions + position) * op.channels};
}

// Calls function(channel, count, start) for blocks of channels, start being where their elements are, in the order in
// which they lie: several positions at once would read what belongs to a channel once for all of them, but the processor
// foresees memory best in that order.
template <class Function>
inline void for_blocks_of(const GroupNorm& op, const Chunk& chunk, Function function) {
  for (int64_t position = 0; position < chunk.positions; position++) {
    const int64_t start = chunk.start + position * op.channels;
    for_blocks(op.channels, [&](int64_t channel, auto count) __attribute__((always_inline)) {
      function(channel, count, start + channel);
    });
  }
}

inline float* chunk_moments(const GroupNorm& op, int64_t item) { return op.scratch + item * 2 * op.channels; }

// (samples, 3, channels): center, gain, offset.
inline float* channel_maps(const GroupNorm& op, int64_t sample) {
  return op.scratch + op.samples * op.chunks() * 2 * op.channels + sample * 3 * op.channels;
}

template <class T>
inline void chunk_moments_of(const GroupNorm& op, int64_t item) {
  const Chunk chunk = chunk_of(op, item);
  const int64_t channels = op.channels;
  const T* x = static_cast<const T*>(op.x);
  float *mean = chunk_moments(op, item), *squares = mean + channels;
  memset(mean, 0, size_t(2 * channels) * sizeof(float));
  for_blocks_of(op, chunk, [=](int64_t channel, auto count, int64_t start) __attribute__((always_inline)) {
#pragma omp simd
    for (int64_t j = 0; j < count; j++) mean[channel + j] += to_float(x[start + j]);
  });
  const float inverse = 1.0f / float(chunk.positions);
#pragma omp simd
  for (int64_t c = 0; c < channels; c++) mean[c] *= inverse;
  const int64_t next = chunk.positions * channels;  // the next chunk comes from memory meanwhile
  for_blocks_of(op, chunk, [=](int64_t channel, auto count, int64_t start) __attribute__((always_inline)) {
    __builtin_prefetch(x + start + next);
#pragma omp simd
    for (int64_t j = 0; j < count; j++) {
      const float apart = to_float(x[start + j]) - mean[channel + j];
      squares[channel + j] += product(apart, apart);
    }
  });
}

void group_norm_moments(const GroupNorm& op, int64_t first, int64_t last) {
  with_type(op.type, [&](auto element) {
    for (int64_t item = first; item < last; item++) chunk_moments_of<decltype(element)>(op, item);
  });
}

void group_norm_maps(const GroupNorm& op, int64_t first, int64_t last) {
  const int64_t channels = op.channels, width = op.group_channels(), chunks = op.chunks();
  for (int64_t sample = first; sample < last; sample++) {
    double *mean = op.moments + sample * 2 * channels, *squares = mean + channels;
    memset(mean, 0, size_t(2 * channels) * sizeof(double));
    for (int64_t item = sample * chunks; item < (sample + 1) * chunks; item++) {
      const double share = double(chunk_of(op, item).positions) / double(op.positions);
      const float* part = chunk_moments(op, item);
#pragma omp simd
      for (int64_t c = 0; c < channels; c++) mean[c] += share * double(part[c]);
    }
    for (int64_t item = sample * chunks; item < (sample + 1) * chunks; item++) {
      const double n = double(chunk_of(op, item).positions);
      const float* part = chunk_moments(op, item);
#pragma omp simd
      for (int64_t c = 0; c < channels; c++) {
        const double apart = double(part[c]) - mean[c];
        squares[c] += double(part[channels + c]) + n * (apart * apart);
      }
    }
    const float* add = op.add.of(sample);
#pragma omp simd
    for (int64_t c = 0; c < channels; c++) mean[c] += double(add[c]);
    float* maps = channel_maps(op, sample);
    for (int64_t g = 0; g < op.groups; g++) {
      Moments group = {double(width * op.positions), 0, 0};
      for (int64_t c = g * width; c < (g + 1) * width; c++) group.mean += mean[c];
      group.mean /= double(width);
      for (int64_t c = g * width; c < (g + 1) * width; c++) {
        const double apart = mean[c] - group.mean;
        group.squares += squares[c] + double(op.positions) * (apart * apart);
      }
      const float group_mean = float(group.mean), rstd = rstd_of(group, op.eps);
      op.mean[sample * op.groups + g] = group_mean;
      op.rstd[sample * op.groups + g] = rstd;
#pragma omp simd
      for (int64_t c = g * width; c < (g + 1) * width; c++) {
        const ChannelMap map = map_of(op, sample, c, group_mean, rstd);
        maps[c] = map.center;
        maps[channels + c] = map.gain;
        maps[2 * channels + c] = map.offset;
      }
    }
  }
}

template <class T, bool kSilu>
inline void apply_to_chunk(const GroupNorm& op, int64_t item) {
  const Chunk chunk = chunk_of(op, item);
  const int64_t channels = op.channels;
  const float *center = channel_maps(op, chunk.sample), *gain = center + channels, *offset = gain + channels;
  const T* x = static_cast<const T*>(op.x);
  T* y = static_cast<T*>(op.y);
  for_blocks_of(op, chunk, [=](int64_t channel, auto count, int64_t start) __attribute__((always_inline)) {
    __builtin_prefetch(x + start + kTile);
#pragma omp simd
    for (int64_t j = 0; j < count; j++) {
      const int64_t c = channel + j;
      from_float(emd::group_norm<kSilu>(to_float(x[start + j]), center[c], gain[c], offset[c]), y[start + j]);
    }
  });
}

void group_norm_apply(const GroupNorm& op, int64_t first, int64_t last) {
  with_kind(op, [&](auto element, auto silu) {
    for (int64_t item = first; item < last; item++) apply_to_chunk<decltype(element), silu>(op, item);
  });
}

}  // namespace
}  // namespace emd::cpu::EMD_ISA
