#pragma once

#include "noise.h"

namespace emd::cpu::EMD_ISA {
namespace {

void uniform(const Uniform& op, int64_t first, int64_t last) {
  for_tiles(op.shape, first, last, [&](const Tile& tile) {
    Buffer drawn;
    tile_uniforms(op.noise, tile, drawn);
    memcpy(static_cast<float*>(op.out.data) + tile.flat, drawn.data, size_t(tile.size()) * sizeof(float));
  });
}

}  // namespace
}  // namespace emd::cpu::EMD_ISA
