// The noise of a tile, by the noise contract: a number depends on its sample and element, and on nothing else.
#pragma once

#include "../../core/normal.h"
#include "philox_lanes.h"
#include "tile.h"

namespace emd::cpu::EMD_ISA {
namespace {

static_assert(kTile == 4 * kBlocks);

struct alignas(64) Blocks {
  uint32_t word[4][kBlocks];
};

// The random words of a tile; where it holds several samples, each has whole blocks. Returns the number of blocks.
inline int tile_blocks(const NoiseSource& source, const Tile& tile, Blocks& blocks) {
  alignas(64) uint32_t block[kBlocks], sample[kBlocks];
  const NoiseKey noise = key_of(source);
  const int per_sample = int((tile.count + 3) / 4), n = int(tile.samples) * per_sample;
  const uint32_t first_block = uint32_t(tile.element / 4), first_sample = noise.first_sample + uint32_t(tile.sample);
  for (int s = 0, l = 0; s < int(tile.samples); s++) {
    for (int b = 0; b < per_sample; b++, l++) {
      block[l] = first_block + uint32_t(b);
      sample[l] = first_sample + uint32_t(s);
    }
  }
  const int rounded = (n + 31) / 32 * 32;
  for (int l = n; l < rounded; l++) block[l] = sample[l] = 0;
  philox_blocks(block, sample, noise.stream_substep, noise.step, noise.key0, noise.key1, rounded, blocks.word);
  return n;
}

// Takes out the numbers that fill up the last block of each sample.
inline void drop_padding(const Tile& tile, float* out) {
  if (tile.samples == 1 || tile.count % 4 == 0) return;
  const int64_t padded = (tile.count + 3) / 4 * 4;
  for (int64_t s = 1; s < tile.samples; s++) {
    for (int64_t i = 0; i < tile.count; i++) out[s * tile.count + i] = out[s * padded + i];
  }
}

inline void tile_uniforms(const NoiseSource& noise, const Tile& tile, Buffer& out) {
  Blocks blocks;
  const int n = (tile_blocks(noise, tile, blocks) + 15) / 16 * 16;
#pragma omp simd
  for (int l = 0; l < n; l++) {
    out.data[4 * l + 0] = uniform_from_word(blocks.word[0][l]);
    out.data[4 * l + 1] = uniform_from_word(blocks.word[1][l]);
    out.data[4 * l + 2] = uniform_from_word(blocks.word[2][l]);
    out.data[4 * l + 3] = uniform_from_word(blocks.word[3][l]);
  }
  drop_padding(tile, out.data);
}

inline void tile_normals(const NoiseSource& noise, const Tile& tile, Buffer& out) {
  Blocks blocks;
  const int n = (tile_blocks(noise, tile, blocks) + 15) / 16 * 16;  // whole vectors, so that no scalar rest remains
#pragma omp simd
  for (int l = 0; l < n; l++) {
    const Pair a = normal_pair(blocks.word[0][l], blocks.word[1][l]);
    const Pair b = normal_pair(blocks.word[2][l], blocks.word[3][l]);
    out.data[4 * l + 0] = a.first;
    out.data[4 * l + 1] = a.second;
    out.data[4 * l + 2] = b.first;
    out.data[4 * l + 3] = b.second;
  }
  drop_padding(tile, out.data);
}

}  // namespace
}  // namespace emd::cpu::EMD_ISA
