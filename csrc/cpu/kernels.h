// The compiled loops: plain data, no torch, so that they can be compiled once per instruction set without sharing a
// single inline function with the rest of the library.
#pragma once

#include <stdint.h>

#include "../core/arguments.h"

namespace emd::cpu {

// Elements are processed in tiles that stay in the first-level cache: parts of a sample, or, where samples are small,
// several whole ones. A tile starts at a multiple of four elements, as Philox blocks do.
constexpr int64_t kTile = 1024;

EMD_HD int64_t samples_per_tile(const Shape& shape) {
  const int64_t padded = (shape.elements + 3) / 4 * 4;
  return padded < kTile / 2 && shape.elements > 0 ? kTile / padded : 1;
}

// Of those that hold only one sample.
EMD_HD int64_t tiles_per_sample(const Shape& shape) { return (shape.elements + kTile - 1) / kTile; }

EMD_HD int64_t tiles_of(const Shape& shape) {
  const int64_t together = samples_per_tile(shape);
  return together > 1 ? (shape.samples + together - 1) / together : shape.samples * tiles_per_sample(shape);
}

// Numbers (samples, channels), or one row (channels) for all samples.
struct PerChannel {
  const float* data;
  int64_t step;  // from one sample to the next

  EMD_HD const float* of(int64_t sample) const { return data + sample * step; }
  EMD_HD bool shared() const { return step == 0; }
};

// x is (samples, channels, positions), or (samples, positions, channels) where channels_last.
struct GroupNorm {
  const void* x;
  Type type;
  bool channels_last, silu;
  int64_t samples, channels, positions, groups;
  double eps;
  const float *weight, *bias;         // (channels)
  PerChannel add, scale, shift;       // zeros for all samples where not given
  float *mean, *rstd;                 // (samples, groups)
  void* y;
  float* scratch;    // channels_last: (samples, chunks, 2, channels) moments of chunks, then (samples, 3, channels) maps
  double* moments;   // channels_last: (samples, 2, channels) means and sums of squared deviations

  EMD_HD int64_t group_channels() const { return channels / groups; }
  // Positions that are taken together where channels come last: about 8192 elements, to stay in the cache.
  EMD_HD int64_t chunk() const {
    const int64_t fitting = channels > 0 ? 8192 / channels : 1;
    return fitting < 4 ? 4 : fitting > 256 ? 256 : fitting;
  }
  EMD_HD int64_t chunks() const { return (positions + chunk() - 1) / chunk(); }
};

struct GroupNormBackward {
  GroupNorm forward;  // y is not written
  const void* grad;
  void* grad_x;     // null where not needed
  double* sums;     // (3, samples, channels): of the inner gradient i, of i n and of n, the normalised x
  bool sums_x;      // whether the last of the sums is needed
  float* scratch;   // the inner gradient of a group or a tile; channels_last: the sums of chunks,
                    // (samples, chunks, 3, channels), then the numbers of channels, (samples, 5, channels)
  float* inner;     // channels_last: where the inner gradient of a sample waits for what is subtracted from it; null
                    // where it is computed twice
};

// A convolution 3x3 of stride 1 and padding 1, from x (samples, height, width, in) to y (samples, height, width, out).
// Channels lie side by side in both.
struct Winograd {
  static constexpr int64_t kChannels = 8;  // that channels have to be a multiple of
  static constexpr int64_t kBlock = 24;    // most tiles in a block

  const float *x, *weight, *bias;           // bias (out), null where there is none
  int64_t of_sample, of_row, of_column;     // strides of x
  int64_t strides[4];                       // of the weight (out, in, 3, 3)
  float* y;
  int64_t samples, height, width, in, out;
  int64_t block;    // tiles that are transformed and multiplied together, from cache to cache
  float* products;  // (16, in, out) transformed weights
  float* scratch;   // (16, block, in + out)

  EMD_HD int64_t tiles() const { return samples * ((height + 1) / 2) * ((width + 1) / 2); }
  EMD_HD int64_t blocks() const { return (tiles() + block - 1) / block; }
};

// One table per instruction set. Each function does the items first to last - 1 of its op.
struct Kernels {
  const char* isa;
  void (*uniform)(const Uniform&, int64_t first, int64_t last);
  void (*normal)(const Normal&, int64_t first, int64_t last);
  void (*perturb)(const Perturb&, int64_t first, int64_t last);
  void (*langevin_eps)(const LangevinEps&, int64_t first, int64_t last);
  void (*langevin_z)(const LangevinZ&, int64_t first, int64_t last);
  // Sums are taken tile by tile, in a fixed order, into partial[sample * tiles_per_sample + tile].
  void (*m_step_loss)(const MStepLoss&, double* partial, int64_t first, int64_t last);
  void (*m_step_gradient)(const MStepGradient&, int64_t first, int64_t last);
  void (*score_matching_loss)(const ScoreMatchingLoss&, double* partial, int64_t first, int64_t last);
  void (*score_matching_gradient)(const ScoreMatchingGradient&, int64_t first, int64_t last);
  void (*group_norm)(const GroupNorm&, int64_t first, int64_t last);             // items: sample, group
  void (*group_norm_moments)(const GroupNorm&, int64_t first, int64_t last);     // items: sample, chunk
  void (*group_norm_maps)(const GroupNorm&, int64_t first, int64_t last);        // items: sample
  void (*group_norm_apply)(const GroupNorm&, int64_t first, int64_t last);       // items: sample, chunk
  void (*group_norm_backward)(const GroupNormBackward&, int64_t first, int64_t last);           // sample, group
  void (*group_norm_backward_maps)(const GroupNormBackward&, int64_t first, int64_t last);      // sample
  void (*group_norm_backward_sums)(const GroupNormBackward&, int64_t first, int64_t last);      // sample, chunk
  void (*group_norm_backward_totals)(const GroupNormBackward&, int64_t first, int64_t last);   // sample
  void (*group_norm_backward_apply)(const GroupNormBackward&, int64_t first, int64_t last);     // sample, chunk
  // Null where products of vectors are not added to a sum in one instruction.
  void (*winograd_weight)(const Winograd&, int64_t first, int64_t last);  // items: input channel
  void (*winograd)(const Winograd&, int64_t first, int64_t last);         // items: block
};

// The table for this machine, or for the lower instruction set that the environment variable EMD_FAST_ISA names.
const Kernels& kernels();

}  // namespace emd::cpu
