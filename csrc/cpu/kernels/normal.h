#pragma once

#include "noise.h"

namespace emd::cpu::EMD_ISA {
namespace {

void normal(const Normal& op, int64_t first, int64_t last) {
  for_tiles(op.shape, first, last, [&](const Tile& tile) {
    Buffer drawn;
    tile_normals(op.noise, tile, Prefetcher(tile), drawn);
    if (op.out.type == Type::float32) {
      memcpy(static_cast<float*>(op.out.data) + tile.flat, drawn.data, size_t(tile.size()) * sizeof(float));
    } else {
      finish(op.out, tile, drawn.data);
    }
  });
}

}  // namespace
}  // namespace emd::cpu::EMD_ISA
