#pragma once

#include "../../core/langevin.h"
#include "noise.h"

namespace emd::cpu::EMD_ISA {
namespace {

void langevin_z(const LangevinZ& op, int64_t first, int64_t last) {
  for_tiles(op.shape, first, last, [&](const Tile& tile) {
    Buffer drawn, buffer;
    Ahead ahead(tile);
    ahead.of(op.z);
    ahead.of(op.gradient);
    tile_normals(op.noise, tile, ahead, drawn);
    const float *noise = drawn.data, *gradient = read(op.gradient, tile, op.shape.elements, buffer);
    float* z = op.z + tile.flat;
    const int64_t n = tile.size();
    with_numbers(
        tile,
        [=](auto step_size) {
#pragma omp simd
          for (int64_t i = 0; i < n; i++) {
            const float gamma = at(step_size, i);
            z[i] = langevin_step(z[i], gradient[i], gamma, langevin_kick(gamma), noise[i]);
          }
        },
        op.step_size);
  });
}

}  // namespace
}  // namespace emd::cpu::EMD_ISA
