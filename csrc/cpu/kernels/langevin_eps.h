#pragma once

#include "../../core/langevin.h"
#include "noise.h"

namespace emd::cpu::EMD_ISA {
namespace {

void langevin_eps(const LangevinEps& op, int64_t first, int64_t last) {
  for_tiles(op.shape, first, last, [&](const Tile& tile) {
    Buffer delta_buffer, drawn, buffer;
    const int64_t n = tile.size();
    Prefetcher prefetcher(tile);
    prefetcher.add(op.eps);
    prefetcher.add(op.drift);
    for (int t = 0; t < op.terms; t++) prefetcher.add(op.term[t]);
    tile_normals(op.noise, tile, prefetcher, drawn);
    float* delta = delta_buffer.data;
    for (int t = 0; t < op.terms; t++) {
      const float* term = read(op.term[t], tile, op.shape.elements, buffer);
      with_numbers(
          tile,
          [=](auto coef) {
            if (t == 0) {
#pragma omp simd
              for (int64_t i = 0; i < n; i++) delta[i] = product(at(coef, i), term[i]);
            } else {
#pragma omp simd
              for (int64_t i = 0; i < n; i++) delta[i] = delta[i] + product(at(coef, i), term[i]);
            }
          },
          op.coef[t]);
    }
    const bool exact = op.exact;
    const float* noise = drawn.data;
    float *eps = op.eps + tile.flat, *drift = op.drift + tile.flat, *out = begin(op.out, tile, buffer);
    with_numbers(
        tile,
        [=](auto alpha, auto sigma, auto step_size) {
#pragma omp simd
          for (int64_t i = 0; i < n; i++) {
            const float step = at(step_size, i), gradient = product(at(sigma, i), delta[i]);
            drift[i] = langevin_drift(drift[i], gradient, step);
            eps[i] = langevin_step(eps[i], gradient, step, langevin_noise_scale(step, exact), noise[i]);
            out[i] = product(at(alpha, i), delta[i]);
          }
        },
        op.alpha, op.sigma, op.step_size);
    finish(op.out, tile, out);
  });
}

}  // namespace
}  // namespace emd::cpu::EMD_ISA
