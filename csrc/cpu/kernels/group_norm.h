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

// Channels before positions: a group is one dense row, small enough in most networks to be in the cache still when it
// is read again.
void group_norm(const GroupNorm& op, int64_t first, int64_t last) {
  const int64_t width = op.group_channels(), positions = op.positions;
  for (int64_t item = first; item < last; item++) {
    const int64_t sample = item / op.groups, channel0 = item % op.groups * width;
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
    for (int64_t c = 0; c < width; c++) {
      const ChannelMap map = map_of(op, sample, channel0 + c, mean, rstd);
      for (int64_t done = 0; done < positions; done += kTile) {
        Buffer x_buffer, y_buffer;
        const int64_t count = positions - done < kTile ? positions - done : kTile, row = start + c * positions + done;
        const float* x = read_row(op.x, op.type, row, count, x_buffer.data);
        float* y = begin_row(op.y, op.type, row, y_buffer.data);
        apply_map(op.silu, count, x, y, map.center, map.gain, map.offset);
        finish_row(op.y, op.type, row, count, y);
      }
    }
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

inline float* chunk_moments(const GroupNorm& op, int64_t item) { return op.scratch + item * 2 * op.channels; }

// (samples, 3, channels): center, gain, offset.
inline float* channel_maps(const GroupNorm& op, int64_t sample) {
  return op.scratch + op.samples * op.chunks() * 2 * op.channels + sample * 3 * op.channels;
}

void group_norm_moments(const GroupNorm& op, int64_t first, int64_t last) {
  const int64_t channels = op.channels;
  for (int64_t item = first; item < last; item++) {
    const Chunk chunk = chunk_of(op, item);
    float *mean = chunk_moments(op, item), *squares = mean + channels;
    const float inverse = 1.0f / float(chunk.positions);
    for (int64_t c0 = 0; c0 < channels; c0 += kTile) {
      const int64_t width = channels - c0 < kTile ? channels - c0 : kTile;
      float *m = mean + c0, *s = squares + c0;
      Buffer buffer;
      for (int64_t p = 0; p < chunk.positions; p++) {
        const float* x = read_row(op.x, op.type, chunk.start + p * channels + c0, width, buffer.data);
        if (p == 0) {
#pragma omp simd
          for (int64_t c = 0; c < width; c++) m[c] = x[c];
        } else {
#pragma omp simd
          for (int64_t c = 0; c < width; c++) m[c] += x[c];
        }
      }
#pragma omp simd
      for (int64_t c = 0; c < width; c++) m[c] *= inverse;
      memset(s, 0, size_t(width) * sizeof(float));
      for (int64_t p = 0; p < chunk.positions; p++) {
        const float* x = read_row(op.x, op.type, chunk.start + p * channels + c0, width, buffer.data);
#pragma omp simd
        for (int64_t c = 0; c < width; c++) s[c] += product(x[c] - m[c], x[c] - m[c]);
      }
    }
  }
}

void group_norm_maps(const GroupNorm& op, int64_t first, int64_t last) {
  const int64_t channels = op.channels, width = op.group_channels();
  for (int64_t sample = first; sample < last; sample++) {
    for (int64_t g = 0; g < op.groups; g++) {
      Moments group = {0, 0, 0};
      for (int64_t c = g * width; c < (g + 1) * width; c++) {
        Moments channel = {0, 0, 0};
        for (int64_t k = 0; k < op.chunks(); k++) {
          const int64_t item = sample * op.chunks() + k;
          const float* moments = chunk_moments(op, item);
          const Moments part = {double(chunk_of(op, item).positions), double(moments[c]), double(moments[channels + c])};
          channel = k == 0 ? part : merged(channel, part);
        }
        channel.mean += double(number_or(op.add, sample * channels + c, 0));
        group = c == g * width ? channel : merged(group, channel);
      }
      const float mean = float(group.mean), rstd = rstd_of(group, op.eps);
      op.mean[sample * op.groups + g] = mean;
      op.rstd[sample * op.groups + g] = rstd;
      float* maps = channel_maps(op, sample);
      for (int64_t c = g * width; c < (g + 1) * width; c++) {
        const ChannelMap map = map_of(op, sample, c, mean, rstd);
        maps[c] = map.center;
        maps[channels + c] = map.gain;
        maps[2 * channels + c] = map.offset;
      }
    }
  }
}

void group_norm_apply(const GroupNorm& op, int64_t first, int64_t last) {
  const int64_t channels = op.channels;
  for (int64_t item = first; item < last; item++) {
    const Chunk chunk = chunk_of(op, item);
    const float* maps = channel_maps(op, chunk.sample);
    for (int64_t p = 0; p < chunk.positions; p++) {
      for (int64_t c0 = 0; c0 < channels; c0 += kTile) {
        Buffer x_buffer, y_buffer;
        const int64_t width = channels - c0 < kTile ? channels - c0 : kTile, row = chunk.start + p * channels + c0;
        const float* x = read_row(op.x, op.type, row, width, x_buffer.data);
        float* y = begin_row(op.y, op.type, row, y_buffer.data);
        apply_map(op.silu, width, x, y, maps + c0, maps + channels + c0, maps + 2 * channels + c0);
        finish_row(op.y, op.type, row, width, y);
      }
    }
  }
}

}  // namespace
}  // namespace emd::cpu::EMD_ISA
