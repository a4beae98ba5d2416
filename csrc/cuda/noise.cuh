// Noise of a thread's run, by the noise contract (docs/algorithm.md).
#pragma once

#include "../core/normal.h"
#include "elements.cuh"

namespace emd::cuda {

__device__ inline void four_uniforms(const Words& words, float* u) {
  u[0] = uniform_from_word(words.w0);
  u[1] = uniform_from_word(words.w1);
  u[2] = uniform_from_word(words.w2);
  u[3] = uniform_from_word(words.w3);
}

__device__ inline void four_normals(const Words& words, float* n) {
  const Pair a = normal_pair(words.w0, words.w1), b = normal_pair(words.w2, words.w3);
  n[0] = a.first;
  n[1] = a.second;
  n[2] = b.first;
  n[3] = b.second;
}

template <class Four>
__device__ Float8 drawn(Four four, const NoiseSource& noise, const ElementRange& range) {
  const NoiseKey key = key_of(noise);
  const uint32_t block = uint32_t(range.element / 4), sample = uint32_t(range.sample);
  Float8 run;
  four(words_of(key, block, sample), run.at);
  four(words_of(key, block + 1, sample), run.at + 4);
  return run;
}

__device__ inline Float8 uniforms(const NoiseSource& noise, const ElementRange& range) {
  return drawn([](const Words& words, float* u) { four_uniforms(words, u); }, noise, range);
}

__device__ inline Float8 normals(const NoiseSource& noise, const ElementRange& range) {
  return drawn([](const Words& words, float* n) { four_normals(words, n); }, noise, range);
}

}  // namespace emd::cuda
