#pragma once

#include <math.h>

#include "../../core/group_norm.h"
#include "sums.h"
#include "tile.h"

namespace emd::cpu::EMD_ISA {
namespace {

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
inline Moments tile_moments(const float* x, int64_t n) {
  const float mean = sum<float>(n, [=](int64_t i) { return x[i]; }) / float(n);
  return {double(n), double(mean), double(sum<float>(n, [=](int64_t i) { return product(x[i] - mean, x[i] - mean); }))};
}

// Of dense elements, part by part in the cache: each read once from memory, and twice from there.
inline Moments dense_moments(const void* data, Type type, int64_t at, int64_t n) {
  Moments all = {0, 0, 0};
  for (int64_t done = 0; done < n; done += kTile) {
    Buffer buffer;
    const int64_t count = n - done < kTile ? n - done : kTile;
    const Moments part = tile_moments(read_row(data, type, at + done, count, buffer.data), count);
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

// y[i] from x[i].
template <bool kSilu, class Map>
inline void apply_map(int64_t n, const float* x, float* y, const Map& map) {
  for_blocks(n, [=, &map](int64_t first, auto count) __attribute__((always_inline)) {
#pragma omp simd
    for (int64_t i = first; i < first + count; i++) {
      y[i] = emd::group_norm<kSilu>(x[i], map(kCenter, i), map(kGain, i), map(kOffset, i));
    }
  });
}

template <class Map>
inline void apply_map(bool silu, int64_t n, const float* x, float* y, const Map& map) {
  silu ? apply_map<true>(n, x, y, map) : apply_map<false>(n, x, y, map);
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

inline Moments item_moments(const GroupNorm& op, int64_t item) {
  const int64_t width = op.group_channels(), positions = op.positions, row0 = item * width;
  if (op.add.shared()) return dense_moments(op.x, op.type, row0 * positions, width * positions);
  const int64_t sample = item / op.groups;
  const float* add = op.add.of(sample) + (row0 - sample * op.channels);
  Moments group = {0, 0, 0};
  for (int64_t row = row0; row < row0 + width; row++) {
    Moments channel = dense_moments(op.x, op.type, row * positions, positions);
    channel.mean += double(add[row - row0]);
    group = row == row0 ? channel : merged(group, channel);
  }
  return group;
}

// Of the items that share a tile, the same numbers as item_moments: step by step for all of them, so that the processor
// need not wait for the end of one sum before it starts the next.
inline void moments_of_tile(const GroupNorm& op, int64_t begin, int64_t end) {
  const int64_t items = end - begin, n = op.group_channels() * op.positions;
  Buffer buffer, squares;
  const float* x = read_row(op.x, op.type, begin * n, items * n, buffer.data);
  float *mean = op.mean + begin, *rstd = op.rstd + begin;
  for (int64_t g = 0; g < items; g++) mean[g] = sum<float>(n, [=](int64_t i) { return x[g * n + i]; }) / float(n);
  for (int64_t g = 0; g < items; g++) {
    const float center = mean[g];
    squares.data[g] = sum<float>(n, [=](int64_t i) { return product(x[g * n + i] - center, x[g * n + i] - center); });
  }
#pragma omp simd
  for (int64_t g = 0; g < items; g++) rstd[g] = rstd_of({double(n), 0, double(squares.data[g])}, op.eps);
}

// Items are small enough in most networks to be in the cache still when they are read again.
void group_norm(const GroupNorm& op, int64_t first, int64_t last) {
  const int64_t together = items_together(op);
  for (int64_t begin = first; begin < last; begin += together) {
    const int64_t end = last - begin < together ? last : begin + together;
    if (together > 1 && op.add.shared()) {
      moments_of_tile(op, begin, end);
    } else {
      for (int64_t item = begin; item < end; item++) {
        const Moments group = item_moments(op, item);
        op.mean[item] = float(group.mean);
        op.rstd[item] = rstd_of(group, op.eps);
      }
    }
    for_parts<kMapNumbers>(
        op, begin, end, [&](int64_t row, int64_t count, auto& numbers) { write_maps(op, row, count, numbers); },
        [&](const Rows& rows, const auto& numbers) {
          Buffer x_buffer, y_buffer;
          const float* x = read_row(op.x, op.type, rows.start, rows.size, x_buffer.data);
          float* y = begin_row(op.y, op.type, rows.start, y_buffer.data);
          for_runs(rows, numbers, [&](int64_t first, int64_t n, const auto& map) {
            apply_map(op.silu, n, x + first, y + first, map);
          });
          finish_row(op.y, op.type, rows.start, rows.size, y);
        });
  }
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

// Part of a chunk, at most a tile: several positions with all their channels, or some channels of one position.
struct Part {
  int64_t channels, positions, start;

  EMD_HD int64_t size() const { return channels * positions; }
};

// A power of two: enough for the loop over them to be worth entering, few enough for the maps to be worth repeating.
inline int64_t positions_together(const GroupNorm& op) {
  int64_t together = 1;
  while (2 * together * op.channels <= 256) together *= 2;
  return together;
}

// Calls function(part) for the parts of a chunk, and block(channel, channels) before those of the same channels.
template <class Block, class Function>
inline void for_parts_of(const GroupNorm& op, const Chunk& chunk, Block block, Function function) {
  const int64_t together = positions_together(op);
  for (int64_t channel = 0; channel < op.channels; channel += kTile) {
    const int64_t rest = op.channels - channel, channels = rest < kTile ? rest : kTile;
    block(channel, channels);
    for (int64_t p = 0; p < chunk.positions; p += together) {
      const int64_t left = chunk.positions - p;
      function(Part{channels, left < together ? left : together, chunk.start + p * op.channels + channel});
    }
  }
}

// The same numbers for every position of a part.
inline void repeat(const GroupNorm& op, const float* numbers, int64_t channels, float* out) {
  memcpy(out, numbers, size_t(channels) * sizeof(float));
  // Twice as many each time: a loop over few channels costs more to enter than to run.
  const int64_t all = positions_together(op) * channels;
  for (int64_t done = channels; done < all; done *= 2) memcpy(out + done, out, size_t(done) * sizeof(float));
}

// sums[c] of the entries of channel c, over the positions that share a tile. The lanes are used up.
inline void fold(const GroupNorm& op, Buffer& lanes, int64_t channels, float* sums) {
  float* lane = lanes.data;
  for (int64_t half = positions_together(op) * channels / 2; half >= channels; half /= 2) {
    const float* upper = lane + half;
#pragma omp simd
    for (int64_t i = 0; i < half; i++) lane[i] += upper[i];
  }
  memcpy(sums, lane, size_t(channels) * sizeof(float));
}

inline float* chunk_moments(const GroupNorm& op, int64_t item) { return op.scratch + item * 2 * op.channels; }

// (samples, 3, channels): center, gain, offset.
inline float* channel_maps(const GroupNorm& op, int64_t sample) {
  return op.scratch + op.samples * op.chunks() * 2 * op.channels + sample * 3 * op.channels;
}

void group_norm_moments(const GroupNorm& op, int64_t first, int64_t last) {
  for (int64_t item = first; item < last; item++) {
    const Chunk chunk = chunk_of(op, item);
    float *mean = chunk_moments(op, item), *squares = mean + op.channels;
    const float inverse = 1.0f / float(chunk.positions);
    for (int64_t channel = 0; channel < op.channels; channel += kTile) {
      const int64_t rest = op.channels - channel, channels = rest < kTile ? rest : kTile;
      const int64_t together = positions_together(op);
      Buffer lanes, repeated, buffer;
      float *lane = lanes.data, *m = mean + channel;
      const auto for_rows = [&](auto function) {
        memset(lane, 0, size_t(together * channels) * sizeof(float));
        for (int64_t p = 0; p < chunk.positions; p += together) {
          const int64_t left = chunk.positions - p, n = (left < together ? left : together) * channels;
          function(read_row(op.x, op.type, chunk.start + p * op.channels + channel, n, buffer.data), n);
        }
      };
      for_rows([=](const float* x, int64_t n) {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) lane[i] += x[i];
      });
      fold(op, lanes, channels, m);
#pragma omp simd
      for (int64_t c = 0; c < channels; c++) m[c] *= inverse;
      repeat(op, m, channels, repeated.data);
      const float* means = repeated.data;
      for_rows([=](const float* x, int64_t n) {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) lane[i] += product(x[i] - means[i], x[i] - means[i]);
      });
      fold(op, lanes, channels, squares + channel);
    }
  }
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

void group_norm_apply(const GroupNorm& op, int64_t first, int64_t last) {
  for (int64_t item = first; item < last; item++) {
    const Chunk chunk = chunk_of(op, item);
    const float* maps = channel_maps(op, chunk.sample);
    NumbersTile<kMapNumbers> tile;
    Buffer x_buffer, y_buffer;
    for_parts_of(
        op, chunk,
        [&](int64_t channel, int64_t channels) {
          for (int k = 0; k < kMapNumbers; k++) repeat(op, maps + k * op.channels + channel, channels, tile.data[k]);
        },
        [&](const Part& part) {
          const float* x = read_row(op.x, op.type, part.start, part.size(), x_buffer.data);
          float* y = begin_row(op.y, op.type, part.start, y_buffer.data);
          apply_map(op.silu, part.size(), x, y, tile);
          finish_row(op.y, op.type, part.start, part.size(), y);
        });
  }
}

}  // namespace
}  // namespace emd::cpu::EMD_ISA
