#pragma once

#include "group_norm.h"

namespace emd::cpu::EMD_ISA {
namespace {

// channels_last, in three passes. The first computes the moments of every channel in every chunk
// of positions. The second computes from them the moments of groups and the maps of channels. The
// third applies the maps.

struct Chunk {
  int64_t sample, positions, start;  // start of its elements in the tensor
};

inline Chunk chunk_of(const GroupNorm& op, int64_t item) {
  const int64_t sample = item / op.chunks(), position = item % op.chunks() * op.chunk();
  const int64_t rest = op.positions - position;
  return {sample, rest < op.chunk() ? rest : op.chunk(), (sample * op.positions + position) * op.channels};
}

// Calls function(channel, count, start) for blocks of channels, in memory order. `start` is the
// index of their first element. Several positions per block would load the coefficients of a
// channel less often, but the hardware prefetcher works best in memory order.
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

// Maps (samples, 3, channels): center, gain, offset.
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
  const int64_t next = chunk.positions * channels;  // prefetches the next chunk
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
