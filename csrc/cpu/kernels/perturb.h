#pragma once

#include "../../core/perturb.h"
#include "noise.h"

namespace emd::cpu::EMD_ISA {
namespace {

void perturb(const Perturb& op, int64_t first, int64_t last) {
  for_tiles(op.shape, first, last, [&](const Tile& tile) {
    Buffer drawn, x0_buffer, out_buffer;
    const float* eps = drawn.data;
    if (op.draws) {
      Prefetcher prefetcher(tile);
      prefetcher.add(op.x0);
      tile_normals(op.noise, tile, prefetcher, drawn);
    } else {
      eps = read(op.eps, tile, op.shape.elements, drawn);
    }
    const float* x0 = read(op.x0, tile, op.shape.elements, x0_buffer);
    float* out = begin(op.out, tile, out_buffer);
    const int64_t n = tile.size();
    with_numbers(
        tile,
        [=](auto alpha, auto sigma) {
#pragma omp simd
          for (int64_t i = 0; i < n; i++) out[i] = emd::perturb(x0[i], eps[i], at(alpha, i), at(sigma, i));
        },
        op.alpha, op.sigma);
    finish(op.out, tile, out);
  });
}

}  // namespace
}  // namespace emd::cpu::EMD_ISA
