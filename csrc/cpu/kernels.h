// What the compiled loops take: plain data, no torch, so that they can be compiled once per instruction set without
// sharing a single inline function with the rest of the library.
#pragma once

#include <stdint.h>

#include "../core/macros.h"

namespace emd::cpu {

enum class Type : int { float32, bfloat16, float16 };

constexpr int kMaxDims = 6;

// A tensor to read, sample by sample, each in row-major order. Strides are in elements.
struct Source {
  const void* data;
  Type type;
  bool dense;  // the elements of one sample follow one another
  int64_t sample_stride;
  int dims;  // of one sample, merged where strides allow
  int64_t sizes[kMaxDims], strides[kMaxDims];
};

// A contiguous tensor to write.
struct Target {
  void* data;
  Type type;
};

// One number per sample; the stride is 0 where all samples share it.
struct PerSample {
  const float* data;
  int64_t stride;
};

// Elements are processed in tiles that stay in the first-level cache: parts of a sample, or, where samples are small,
// several whole ones. A tile starts at a multiple of four elements, as Philox blocks do.
constexpr int64_t kTile = 1024;

struct Shape {
  int64_t samples, elements;  // elements of one sample

  EMD_HD int64_t padded() const { return (elements + 3) / 4 * 4; }
  EMD_HD int64_t samples_per_tile() const { return padded() < kTile / 2 && elements > 0 ? kTile / padded() : 1; }
  EMD_HD int64_t tiles_per_sample() const { return (elements + kTile - 1) / kTile; }  // of those that hold only one
  EMD_HD int64_t tiles() const {
    const int64_t together = samples_per_tile();
    return together > 1 ? (samples + together - 1) / together : samples * tiles_per_sample();
  }
};

// The key and the part of the counter that one call shares.
struct NoiseKey {
  uint32_t key0, key1, first_sample, stream_substep, step;
};

struct Draw {
  Shape shape;
  NoiseKey noise;
  Target out;
};

struct Perturb {
  Shape shape;
  Source x0;
  PerSample alpha, sigma;
  bool draws;
  Source eps;      // where not draws
  NoiseKey noise;  // where draws
  Target out;
};

constexpr int kMaxTerms = 5;

struct LangevinEps {
  Shape shape;
  float *eps, *drift;
  int terms;  // delta is the sum of coefs[i] times terms[i]
  Source term[kMaxTerms];
  PerSample coef[kMaxTerms];
  PerSample alpha, sigma, step_size;
  NoiseKey noise;
  Target out;
};

struct LangevinZ {
  Shape shape;
  float* z;
  Source gradient;
  PerSample step_size;
  NoiseKey noise;
};

// Sums are taken tile by tile in a fixed order, into partial[sample * tiles_per_sample + tile].
struct MStepLoss {
  Shape shape;
  const float* drift;
  double* partial;
};

struct MStepGradient {
  Shape shape;
  const float* drift;
  PerSample grad, alpha, sigma, weight;
  Target out;
};

struct ScoreMatching {
  Shape shape;
  Source output, x0, x_t;
  PerSample c_skip, c_out;
  double* partial;            // of the loss
  PerSample grad, weight;     // of its gradient
  Target out;
};

// x is (samples, channels, positions), or (samples, positions, channels) where channels_last.
struct GroupNorm {
  const void* x;
  Type type;
  bool channels_last, silu;
  int64_t samples, channels, positions, groups;
  double eps;
  const float *weight, *bias;         // (channels) or null
  const float *add, *scale, *shift;   // (samples, channels) or null
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
  double* sums;     // (samples, 3, channels): of the inner gradient, of it times (x - center), of x - center
  bool sums_x;      // whether the last of the sums is needed
  float* scratch;   // a group's inner gradient; channels_last: the sums of chunks, (samples, chunks, 3, channels),
                    // then the numbers of channels, (samples, 5, channels)
};

// One table per instruction set. Each function does the items first to last - 1 of its op.
struct Kernels {
  const char* isa;
  void (*uniform)(const Draw&, int64_t first, int64_t last);
  void (*normal)(const Draw&, int64_t first, int64_t last);
  void (*perturb)(const Perturb&, int64_t first, int64_t last);
  void (*langevin_eps)(const LangevinEps&, int64_t first, int64_t last);
  void (*langevin_z)(const LangevinZ&, int64_t first, int64_t last);
  void (*m_step_loss)(const MStepLoss&, int64_t first, int64_t last);
  void (*m_step_gradient)(const MStepGradient&, int64_t first, int64_t last);
  void (*score_matching_loss)(const ScoreMatching&, int64_t first, int64_t last);
  void (*score_matching_gradient)(const ScoreMatching&, int64_t first, int64_t last);
  void (*group_norm)(const GroupNorm&, int64_t first, int64_t last);             // items: sample, group
  void (*group_norm_moments)(const GroupNorm&, int64_t first, int64_t last);     // items: sample, chunk
  void (*group_norm_maps)(const GroupNorm&, int64_t first, int64_t last);        // items: sample
  void (*group_norm_apply)(const GroupNorm&, int64_t first, int64_t last);       // items: sample, chunk
  void (*group_norm_backward)(const GroupNormBackward&, int64_t first, int64_t last);           // sample, group
  void (*group_norm_backward_maps)(const GroupNormBackward&, int64_t first, int64_t last);      // sample
  void (*group_norm_backward_sums)(const GroupNormBackward&, int64_t first, int64_t last);      // sample, chunk
  void (*group_norm_backward_totals)(const GroupNormBackward&, int64_t first, int64_t last);   // sample
  void (*group_norm_backward_apply)(const GroupNormBackward&, int64_t first, int64_t last);     // sample, chunk
};

// The table for this machine, or for the lower instruction set that the environment variable EMD_FAST_ISA names.
const Kernels& kernels();

}  // namespace emd::cpu
