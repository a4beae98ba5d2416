#pragma once

#include "../../core/m_step.h"
#include "sums.h"
#include "tile.h"

namespace emd::cpu::EMD_ISA {
namespace {

void m_step_loss(const MStepLoss& op, double* partial, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; i++) {
    const Tile tile = sample_tile(op.shape, i);
    const float* drift = op.drift + tile.flat;
    partial[i] = sum<double>(tile.count, [=](int64_t e) { return double(drift[e]) * double(drift[e]); });
  }
}

void m_step_gradient(const MStepGradient& op, int64_t first, int64_t last) {
  for_tiles(op.shape, first, last, [&](const Tile& tile) {
    Buffer buffer;
    const float* drift = op.drift + tile.flat;
    float* out = begin(op.out, tile, buffer);
    const int64_t n = tile.size();
    const float elements = float(op.shape.elements);
    with_numbers(
        tile,
        [=](auto grad, auto weight, auto alpha, auto sigma) {
#pragma omp simd
          for (int64_t i = 0; i < n; i++) {
            const float factor =
                m_step_gradient_factor(at(grad, i), at(weight, i), at(alpha, i), at(sigma, i), elements);
            out[i] = product(factor, drift[i]);
          }
        },
        op.grad, op.weight, op.alpha, op.sigma);
    finish(op.out, tile, out);
  });
}

}  // namespace
}  // namespace emd::cpu::EMD_ISA
