// Interface of the CPU loops. It uses plain structs without torch, so that the loops can be
// compiled once per instruction set without sharing inline functions with the rest of the library.
#pragma once

#include <stdint.h>

#include "../core/arguments.h"

namespace emd::cpu {

// Elements of a tile, which stays in the L1 cache. A tile is a part of a sample, or several whole
// samples if they are small. It starts at a multiple of four elements, as Philox blocks do.
constexpr int64_t kTile = 1024;

EMD_HD int64_t samples_per_tile(const Shape& shape) {
  const int64_t padded = (shape.elements + 3) / 4 * 4;
  return padded < kTile / 2 && shape.elements > 0 ? kTile / padded : 1;
}

// For tiles that hold (a part of) one sample.
EMD_HD int64_t tiles_per_sample(const Shape& shape) { return (shape.elements + kTile - 1) / kTile; }

EMD_HD int64_t tiles_of(const Shape& shape) {
  const int64_t together = samples_per_tile(shape);
  return together > 1 ? (shape.samples + together - 1) / together : shape.samples * tiles_per_sample(shape);
}

// Numbers (samples, channels), or one row (channels) that all samples share.
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
  PerChannel add, scale, shift;       // shared zeros if not given
  float *mean, *rstd;                 // (samples, groups)
  void* y;
  // channels_last: (samples, chunks, 2, channels) moments of chunks, then (samples, 3, channels) maps.
  float* scratch;
  double* moments;  // channels_last: (samples, 2, channels) means and sums of squared deviations

  EMD_HD int64_t group_channels() const { return channels / groups; }
  // Positions per chunk in channels_last: about 8192 elements, which stay in the cache.
  EMD_HD int64_t chunk() const {
    const int64_t fitting = channels > 0 ? 8192 / channels : 1;
    return fitting < 4 ? 4 : fitting > 256 ? 256 : fitting;
  }
  EMD_HD int64_t chunks() const { return (positions + chunk() - 1) / chunk(); }
};

struct GroupNormBackward {
  GroupNorm forward;  // y is not written
  const void* grad;
  void* grad_x;     // null if not needed
  // (3, samples, channels): sums of the inner gradient i, of i n and of n, the normalized x.
  double* sums;
  bool sums_x;      // whether the sums of n are needed
  float* scratch;   // the inner gradient of a group or a tile; channels_last: the sums of chunks,
                    // (samples, chunks, 3, channels), then the numbers of channels, (samples, 5,
                    // channels)
  // channels_last: the inner gradient of a sample between two passes. Null if it is computed twice.
  float* inner;
};

// 3x3 convolution with stride 1 and padding 1, from x (samples, height, width, in) to y (samples,
// height, width, out). Channels are contiguous in both.
struct Winograd {
  static constexpr int64_t kChannels = 8;  // in and out must be multiples of this
  static constexpr int64_t kBlock = 24;    // maximum tiles per block

  const float *x, *weight, *bias;           // bias (out), or null
  int64_t of_sample, of_row, of_column;     // strides of x
  int64_t strides[4];                       // of the weight (out, in, 3, 3)
  float* y;
  int64_t samples, height, width, in, out;
  int64_t block;    // tiles that are transformed and multiplied together, within the cache
  float* products;  // (16, in, out) transformed weights
  float* scratch;   // (16, block, in + out)

  EMD_HD int64_t tiles() const { return samples * ((height + 1) / 2) * ((width + 1) / 2); }
  EMD_HD int64_t blocks() const { return (tiles() + block - 1) / block; }
};

// One table per instruction set. Each function processes items first to last - 1 of its op.
struct Kernels {
  const char* isa;
  void (*uniform)(const Uniform&, int64_t first, int64_t last);
  void (*normal)(const Normal&, int64_t first, int64_t last);
  void (*perturb)(const Perturb&, int64_t first, int64_t last);
  void (*langevin_eps)(const LangevinEps&, int64_t first, int64_t last);
  void (*langevin_z)(const LangevinZ&, int64_t first, int64_t last);
  // Stores the sum of each tile in partial[sample * tiles_per_sample + tile].
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
  // Null without fused multiply-add instructions on vectors.
  void (*winograd_weight)(const Winograd&, int64_t first, int64_t last);  // items: input channel
  void (*winograd)(const Winograd&, int64_t first, int64_t last);         // items: block
};

// The table for this machine, or for the instruction set that the environment variable
// EMD_FAST_ISA names.
const Kernels& kernels();

}  // namespace emd::cpu
