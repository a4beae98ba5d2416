// Arguments of the CUDA kernels of group_norm, and how they divide the work. Neither torch nor CUDA
// headers are included.
#pragma once

#include "../core/arguments.h"

struct CUstream_st;

namespace emd::cuda {

// (channels), or (samples, channels). `data` is null if not given.
struct PerChannel {
  const void* data;
  Type type;
  int64_t sample_stride, channel_stride;
};

// x and y are (samples, positions, channels), dense.
struct GroupNorm {
  const void* x;
  Type type;
  bool silu;
  int64_t samples;
  uint32_t positions, channels, groups;
  float eps;
  PerChannel weight, bias, add, scale, shift;
  float *mean, *rstd;  // (samples, groups)
  void* y;
  float* scratch;  // (samples, parts, channels, 2), for the tile that is not resident

  EMD_HD uint32_t width() const { return channels / groups; }
  EMD_HD float elements() const { return float(width()) * float(positions); }
};

struct GroupNormBackward {
  GroupNorm forward;  // y is not written
  const void* grad;
  void* grad_x;  // null if not needed
  // (samples, parts, 3, channels): sums over the positions of a part of the inner gradient i, of
  // i n and of n, the normalized x. Null if no gradient of a vector is needed.
  float* sums;
  bool sums_x;     // whether the sums of n are needed
  float* scratch;  // (samples, groups, 2), for the tile that is not resident
};

struct Gradient {
  void* data;  // null if not needed
  Type type;
};

// Gradients of weight and bias (channels), of add, scale and shift (samples, channels).
struct GroupNormVectors {
  GroupNorm forward;
  const float* sums;
  uint32_t parts;
  Gradient weight, bias, add, scale, shift;
};

struct Chip {
  int64_t shared_of_block, shared_of_multiprocessor;  // bytes
  bool clusters;
};

constexpr uint32_t kNormThreads = 384;
constexpr uint32_t kNormRun = 8;  // channels of a thread: 16 bytes of bfloat16

// How a call is divided. A block of threads has `block` channels of `span` positions of a sample. A
// thread has eight channels and walks the positions in steps of `rows`.
struct NormTile {
  bool resident;            // all of x stays in shared memory; the parts of a sample are a cluster
  bool vector;              // 16-byte accesses
  uint32_t block, blocks;   // channels of a block; how many blocks the channels are
  uint32_t vectors, rows;   // threads side by side in a block, and above one another
  uint32_t span, parts;     // positions of a part; how many parts the positions are
  uint32_t shared;          // bytes

  EMD_HD uint32_t threads() const { return (vectors * rows + 31) / 32 * 32; }
  EMD_HD uint32_t steps() const { return (span + rows - 1) / rows; }
  // Rows of sums in shared memory: each of the lower half of the rows takes those of one above.
  EMD_HD uint32_t kept() const { return (rows + 1) / 2; }
};

namespace norm_tile {

inline uint32_t ceil(uint32_t n, uint32_t by) { return (n + by - 1) / by; }

inline uint32_t common_multiple(uint32_t a, uint32_t b) {
  uint32_t x = a, y = b;
  while (y) {
    const uint32_t rest = x % y;
    x = y;
    y = rest;
  }
  return a / x * b;
}

inline NormTile of(uint32_t block, uint32_t channels, uint32_t span, uint32_t parts) {
  NormTile tile = {};
  tile.vector = true;
  tile.block = block;
  tile.blocks = ceil(channels, block);
  tile.vectors = ceil(block, kNormRun);
  // At least four steps where 96 threads remain, since a thread has work of its own besides; and as
  // few rows as take the same number of steps, so that the last step is as full as the others.
  const uint32_t most = kNormThreads / tile.vectors, least = ceil(96, tile.vectors), fourth = ceil(span, 4);
  const uint32_t rows = fourth < least ? least : fourth;
  const uint32_t steps = ceil(span, rows < most ? rows : most);
  tile.rows = ceil(span, steps);
  tile.span = span;
  tile.parts = parts;
  return tile;
}

// Shared memory beside the tile: sums, three numbers a channel and two more in the backward pass,
// and four a group.
inline int64_t shared_of(const NormTile& tile, uint32_t width) {
  return int64_t(tile.kept()) * tile.block * 8 + int64_t(tile.block) * 20 + int64_t(tile.block / width + 1) * 16;
}

}  // namespace norm_tile

// The tile depends on the sizes of a sample and on the chip, and not on the number of samples: a
// sum over a sample is the same in every batch.
//
// Resident tiles: a part holds all of its elements, so that x is read once. There are 32 blocks for
// a sample where each keeps 24 KB, or 16. Two blocks fit on a multiprocessor together, so that one
// computes while the other one waits.
inline NormTile norm_tile_for(uint32_t channels, uint32_t width, uint32_t positions, uint32_t bytes, uint32_t tensors,
                              bool vector, const Chip& chip) {
  const uint32_t unit = norm_tile::common_multiple(width, kNormRun);
  if (vector && channels % kNormRun == 0) {
    constexpr int64_t kKilobyte = 1024, kNoLimit = int64_t{1} << 62;
    const int64_t sample = int64_t(channels) * positions * bytes * tensors;
    const int64_t of_16 = sample / 16 > 12 * kKilobyte ? sample / 16 : 12 * kKilobyte;
    const int64_t of_32 = sample / 32 > 24 * kKilobyte ? sample / 32 : 24 * kKilobyte;
    // 1 KB of each block is the system's.
    const int64_t half = chip.shared_of_multiprocessor / 2 - kKilobyte, whole = chip.shared_of_block;
    const int64_t of_two = half < whole ? half : whole;
    const struct {
      uint32_t row;         // bytes of a position in a block, at least
      int64_t held, shared; // bytes of the tile and of shared memory, at most
    } wishes[] = {{128, of_32 < of_16 ? of_32 : of_16, of_two}, {128, of_16, of_two}, {128, kNoLimit, of_two},
                  {32, of_16, of_two},   {32, kNoLimit, of_two}, {128, kNoLimit, whole}, {32, kNoLimit, whole}};
    for (const auto& wish : wishes) {
      for (uint32_t parts = 1; parts <= (chip.clusters ? 8u : 1u) && parts <= positions; parts *= 2) {
        const uint32_t span = norm_tile::ceil(positions, parts);
        if (norm_tile::ceil(positions, span) != parts) continue;  // no part is empty
        for (uint32_t blocks = 1; blocks <= channels / unit; blocks++) {
          const uint32_t block = channels / blocks;
          if (channels % blocks || block % unit || block > kNormThreads * kNormRun) continue;
          if (block * bytes < wish.row && blocks > 1) break;
          NormTile tile = norm_tile::of(block, channels, span, parts);
          const int64_t rows = int64_t(tile.steps()) * tile.rows, row = int64_t(block) * bytes * tensors;
          const int64_t shared = rows * row + norm_tile::shared_of(tile, width);
          if (shared > wish.shared || span * row > wish.held) continue;
          tile.resident = true;
          tile.shared = uint32_t(shared);
          return tile;
        }
      }
    }
  }
  // Parts of 32 steps, and blocks of whole runs, which need not be whole groups.
  const uint32_t runs = norm_tile::ceil(channels, kNormRun), blocks = norm_tile::ceil(runs, 48);
  const uint32_t vectors = norm_tile::ceil(runs, blocks);
  const uint32_t rows = kNormThreads / vectors, span = positions < rows * 32 ? positions : rows * 32;
  NormTile tile = norm_tile::of(vectors * kNormRun, channels, span, norm_tile::ceil(positions, span));
  tile.vector = vector && channels % kNormRun == 0;
  tile.shared = tile.kept() * tile.block * 8 + tile.block * 20;
  return tile;
}

// The tile of a call on the current device. All pointers of `op` are set, for their alignment.
NormTile tile_of(const GroupNorm& op);
NormTile tile_of(const GroupNormBackward& op);

void run(const GroupNorm& op, const NormTile& tile, CUstream_st* stream);
void run(const GroupNormBackward& op, const NormTile& tile, CUstream_st* stream);
void run(const GroupNormVectors& op, CUstream_st* stream);

}  // namespace emd::cuda
