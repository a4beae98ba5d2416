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

// Of a dense row, part by part in the cache: each read once from memory, and twice from there.
inline Moments row_moments(const void* data, Type type, int64_t at, int64_t n) {
  Moments all = {0, 0, 0};
  for (int64_t done = 0; done < n; done += kTile) {
    Buffer buffer;
    const int64_t count = n - done < kTile ? n - done : kTile;
    const float* x = read_row(data, type, at + done, count, buffer.data);
    const float mean = sum<float>(count, [=](int64_t i) { return x[i]; }) / float(count);
    const float squares = sum<float>(count, [=](int64_t i) { return product(x[i] - mean, x[i] - mean); });
    const Moments part = {double(count), double(mean), double(squares)};
    all = done == 0 ? part : merged(all, part);
  }
  return all;
}

EMD_HD float number_or(const float* numbers, int64_t i, float otherwise) { return numbers ? numbers[i] : otherwise; }

inline ChannelMap map_of(const GroupNorm& op, int64_t sample, int64_t channel, float mean, float rstd) {
  const int64_t i = sample * op.channels + channel;
  return channel_map(mean, rstd, number_or(op.weight, channel, 1), number_or(op.bias, channel, 0),
                     number_or(op.add, i, 0), number_or(op.scale, i, 0), number_or(op.shift, i, 0));
}

inline float rstd_of(const Moments& group, double eps) { return float(1.0 / sqrt(group.squares / group.n + eps)); }

// y[i] from x[i], where `center(i)`, `gain(i)` and `offset(i)` are the map of its channel.
template <class Center, class Gain, class Offset>
inline void apply_map(bool silu, int64_t n, const float* x, float* y, Center center, Gain gain, Offset offset) {
  if (silu) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) y[i] = emd::group_norm<true>(x[i], at(center, i), at(gain, i), at(offset, i));
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) y[i] = emd::group_norm<false>(x[i], at(center, i), at(gain, i), at(offset, i));
  }
}

// The maps of several channels, one entry per element of a tile. Channels are written in order and in whole vectors,
// each over what the one before wrote too much; hence the room at the end.
struct alignas(64) MapTile {
  static constexpr int64_t kVector = 16;
  float center[kTile + kVector], gain[kTile + kVector], offset[kTile + kVector];

  EMD_HD void write(int64_t at, int64_t n, const ChannelMap& map) {
    for (int64_t i = at; i < at + n; i += kVector) {
#pragma omp simd
      for (int64_t j = i; j < i + kVector; j++) {
        center[j] = map.center;
        gain[j] = map.gain;
        offset[j] = map.offset;
      }
    }
  }
};

// Channels before positions, taken in parts of at most a tile: of one channel where it is long, of several whole ones
// where they are short, since a loop of a few elements costs more to enter than to run.
inline int64_t channels_together(const GroupNorm& op) {
  return op.positions < 64 && op.positions > 0 ? kTile / op.positions : 1;
}

// Calls function(first channel, channels, offset of the elements, number of elements, center, gain, offset) for the
// parts of a group; the last three are numbers or arrays.
template <class Function>
inline void for_parts(const GroupNorm& op, int64_t sample, int64_t group, float mean, float rstd, Function function) {
  const int64_t width = op.group_channels(), positions = op.positions, together = channels_together(op);
  const int64_t start = sample * op.channels * positions, end = (group + 1) * width;
  if (together > 1) {
    for (int64_t c0 = group * width; c0 < end; c0 += together) {
      MapTile maps;
      const int64_t channels = end - c0 < together ? end - c0 : together;
      for (int64_t c = 0; c < channels; c++) {
        maps.write(c * positions, positions, map_of(op, sample, c0 + c, mean, rstd));
      }
      const float *center = maps.center, *gain = maps.gain, *offset = maps.offset;
      function(c0, channels, start + c0 * positions, channels * positions, center, gain, offset);
    }
  } else {
    for (int64_t c = group * width; c < end; c++) {
      const ChannelMap map = map_of(op, sample, c, mean, rstd);
      for (int64_t done = 0; done < positions; done += kTile) {
        const int64_t count = positions - done < kTile ? positions - done : kTile;
        function(c, 1, start + c * positions + done, count, map.center, map.gain, map.offset);
      }
    }
  }
}

// A group is one dense row, small enough in most networks to be in the cache still when it is read again.
void group_norm(const GroupNorm& op, int64_t first, int64_t last) {
  const int64_t width = op.group_channels(), positions = op.positions;
  for (int64_t item = first; item < last; item++) {
    const int64_t sample = item / op.groups, group_index = item % op.groups, channel0 = group_index * width;
    const int64_t start = (sample * op.channels + channel0) * positions;
    Moments group = {0, 0, 0};
    if (op.add) {
      for (int64_t c = 0; c < width; c++) {
        Moments channel = row_moments(op.x, op.type, start + c * positions, positions);
        channel.mean += double(op.add[sample * op.channels + channel0 + c]);
        group = c == 0 ? channel : merged(group, channel);
      }
    } else {
      group = row_moments(op.x, op.type, start, width * positions);
    }
    const float mean = float(group.mean), rstd = rstd_of(group, op.eps);
    op.mean[item] = mean;
    op.rstd[item] = rstd;
    for_parts(op, sample, group_index, mean, rstd,
              [&](int64_t, int64_t, int64_t row, int64_t count, auto center, auto gain, auto offset) {
                Buffer x_buffer, y_buffer;
                const float* x = read_row(op.x, op.type, row, count, x_buffer.data);
                float* y = begin_row(op.y, op.type, row, y_buffer.data);
                apply_map(op.silu, count, x, y, center, gain, offset);
                finish_row(op.y, op.type, row, count, y);
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
    if (op.add) {
      for (int64_t c = 0; c < channels; c++) mean[c] += double(op.add[sample * channels + c]);
    }
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
    MapTile tile;
    Buffer x_buffer, y_buffer;
    for_parts_of(
        op, chunk,
        [&](int64_t channel, int64_t channels) {
          repeat(op, maps + channel, channels, tile.center);
          repeat(op, maps + op.channels + channel, channels, tile.gain);
          repeat(op, maps + 2 * op.channels + channel, channels, tile.offset);
        },
        [&](const Part& part) {
          const float *center = tile.center, *gain = tile.gain, *offset = tile.offset;
          const float* x = read_row(op.x, op.type, part.start, part.size(), x_buffer.data);
          float* y = begin_row(op.y, op.type, part.start, y_buffer.data);
          apply_map(op.silu, part.size(), x, y, center, gain, offset);
          finish_row(op.y, op.type, part.start, part.size(), y);
        });
  }
}

}  // namespace
}  // namespace emd::cpu::EMD_ISA
