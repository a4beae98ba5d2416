// Arguments of the kernels, for any device: plain structs without torch.
#pragma once

#include <stdint.h>

#include "macros.h"
#include "philox.h"

namespace emd {

enum class Type : int { float32, bfloat16, float16 };

EMD_HD int bytes_of(Type type) { return type == Type::float32 ? 4 : 2; }

constexpr int kMaxDims = 6;

// An input tensor, read sample by sample in row-major order. Strides are in elements.
struct Source {
  const void* data;
  Type type;
  bool dense;  // the elements of one sample are contiguous
  int64_t sample_stride;
  int dims;  // dimensions of one sample, merged where strides permit
  int64_t sizes[kMaxDims], strides[kMaxDims];
};

// A contiguous output tensor.
struct Target {
  void* data;
  Type type;
};

// One number per sample. If `data` is null, `shared` applies to all samples.
struct PerSample {
  const float* data;
  int64_t stride;
  float shared;
};

EMD_HD float number_of(const PerSample& numbers, int64_t sample) {
  return numbers.data ? numbers.data[sample * numbers.stride] : numbers.shared;
}

struct Shape {
  int64_t samples, elements;  // elements of one sample
};

// Source of the noise of a call. The state is on the device of the call, and the kernel reads it
// there, so that a replayed CUDA graph uses the current state.
struct NoiseSource {
  const int64_t* state;  // seed, step, first sample, substep
  uint32_t stream, substep;
};

// The key, and the part of the counter that is constant in one call.
struct NoiseKey {
  uint32_t key0, key1, first_sample, stream_substep, step;
};

EMD_HD NoiseKey key_of(const NoiseSource& noise) {
  const uint64_t seed = uint64_t(noise.state[0]);
  return {uint32_t(seed), uint32_t(seed >> 32), uint32_t(noise.state[2]),
          noise.stream * 65536u + noise.substep + uint32_t(noise.state[3]), uint32_t(noise.state[1])};
}

EMD_HD Words words_of(const NoiseKey& key, uint32_t block, uint32_t sample) {
  return philox({block, key.first_sample + sample, key.stream_substep, key.step}, key.key0, key.key1);
}

struct Uniform {
  Shape shape;
  NoiseSource noise;
  Target out;
};

struct Normal {
  Shape shape;
  NoiseSource noise;
  Target out;
};

struct Perturb {
  Shape shape;
  Source x0;
  PerSample alpha, sigma;
  bool draws;
  Source eps;         // read if !draws
  NoiseSource noise;  // read if draws
  Target out;
};

constexpr int kMaxTerms = 5;

struct LangevinEps {
  Shape shape;
  float *eps, *drift;
  int terms;  // delta = sum of coef[i] * term[i]
  Source term[kMaxTerms];
  PerSample coef[kMaxTerms];
  PerSample alpha, sigma, step_size;
  bool exact;  // integrator
  NoiseSource noise;
  Target out;
};

struct LangevinZ {
  Shape shape;
  float* z;
  Source gradient;
  PerSample step_size;
  bool exact;  // integrator
  NoiseSource noise;
};

struct MStepLoss {
  Shape shape;
  const float* drift;
  PerSample weight;
  float* loss;
};

struct MStepGradient {
  Shape shape;
  const float* drift;
  PerSample grad, alpha, sigma, weight;
  Target out;
};

struct ScoreMatchingLoss {
  Shape shape;
  Source output, x0, x_t;
  PerSample c_skip, c_out, weight;
  float* loss;
};

struct ScoreMatchingGradient {
  Shape shape;
  Source output, x0, x_t;
  PerSample grad, c_skip, c_out, weight;
  Target out;
};

}  // namespace emd
