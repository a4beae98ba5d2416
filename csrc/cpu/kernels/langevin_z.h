#pragma once

#include "../../core/langevin.h"
#include "noise.h"

namespace emd::cpu::EMD_ISA {
namespace {

void langevin_z(const LangevinZ& op, int64_t first, int64_t last) {
  for_tiles(op.shape, first, last, [&](const Tile& tile) {
    Buffer drawn, buffer;
    Prefetcher prefetcher(tile);
    prefetcher.add(op.z);
    prefetcher.add(op.gradient);
    tile_normals(op.noise, tile, prefetcher, drawn);
    const float *noise = drawn.data, *gradient = read(op.gradient, tile, op.shape.elements, buffer);
    float* z = op.z + tile.flat;
    const int64_t n = tile.size();
    const bool exact = op.exact;
    with_numbers(
        tile,
        [=](auto step_size) {
#pragma omp simd
          for (int64_t i = 0; i < n; i++) {
            const float step = at(step_size, i);
            z[i] = langevin_step(z[i], gradient[i], step, langevin_noise_scale(step, exact), noise[i]);
          }
        },
        op.step_size);
  });
}

}  // namespace
}  // namespace emd::cpu::EMD_ISA
