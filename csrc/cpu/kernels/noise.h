// Noise of a tile, by the noise contract (docs/algorithm.md).
#pragma once

#include "../../core/normal.h"
#include "philox_lanes.h"
#include "tile.h"

namespace emd::cpu::EMD_ISA {
namespace {

constexpr int kTileBlocks = kTile / 4;
static_assert(kTileBlocks % kBlocks == 0);

struct alignas(64) Blocks {
  uint32_t word[4][kBlocks];
};

// Calls use(l, words) with the random words of a tile, kBlocks blocks at a time. l is the index of
// the first block. In a tile of several samples each sample has whole blocks. Prefetches the next
// tile.
template <class Use>
inline void for_blocks(const NoiseSource& source, const Tile& tile, const Prefetcher& prefetcher, Use use) {
  alignas(64) uint32_t block[kTileBlocks], sample[kTileBlocks];
  const NoiseKey noise = key_of(source);
  const int per_sample = int((tile.count + 3) / 4), n = int(tile.samples) * per_sample;
  const uint32_t first_block = uint32_t(tile.element / 4), first_sample = noise.first_sample + uint32_t(tile.sample);
  for (int s = 0, l = 0; s < int(tile.samples); s++) {
    for (int b = 0; b < per_sample; b++, l++) {
      block[l] = first_block + uint32_t(b);
      sample[l] = first_sample + uint32_t(s);
    }
  }
  const int rounded = (n + kBlocks - 1) / kBlocks * kBlocks;
  for (int l = n; l < rounded; l++) block[l] = sample[l] = 0;
  Blocks blocks;
  for (int l = 0; l < rounded; l += kBlocks) {
    prefetcher.prefetch(l / kBlocks, rounded / kBlocks);
    philox_blocks(block + l, sample + l, noise.stream_substep, noise.step, noise.key0, noise.key1, blocks.word);
    use(l, blocks.word);
  }
}

// Removes the unused numbers of the last block of each sample.
inline void drop_padding(const Tile& tile, float* out) {
  if (tile.samples == 1 || tile.count % 4 == 0) return;
  const int64_t padded = (tile.count + 3) / 4 * 4;
  for (int64_t s = 1; s < tile.samples; s++) {
    for (int64_t i = 0; i < tile.count; i++) out[s * tile.count + i] = out[s * padded + i];
  }
}

inline void tile_uniforms(const NoiseSource& noise, const Tile& tile, Buffer& out) {
  for_blocks(noise, tile, Prefetcher(tile), [&](int first, const uint32_t (*word)[kBlocks]) {
    float* to = out.data + 4 * first;
#pragma omp simd
    for (int l = 0; l < kBlocks; l++) {
      to[4 * l + 0] = uniform_from_word(word[0][l]);
      to[4 * l + 1] = uniform_from_word(word[1][l]);
      to[4 * l + 2] = uniform_from_word(word[2][l]);
      to[4 * l + 3] = uniform_from_word(word[3][l]);
    }
  });
  drop_padding(tile, out.data);
}

inline void tile_normals(const NoiseSource& noise, const Tile& tile, const Prefetcher& prefetcher, Buffer& out) {
  for_blocks(noise, tile, prefetcher, [&](int first, const uint32_t (*word)[kBlocks]) {
    float* to = out.data + 4 * first;
#pragma omp simd
    for (int l = 0; l < kBlocks; l++) {
      const Pair a = normal_pair(word[0][l], word[1][l]);
      const Pair b = normal_pair(word[2][l], word[3][l]);
      to[4 * l + 0] = a.first;
      to[4 * l + 1] = a.second;
      to[4 * l + 2] = b.first;
      to[4 * l + 3] = b.second;
    }
  });
  drop_padding(tile, out.data);
}

}  // namespace
}  // namespace emd::cpu::EMD_ISA
