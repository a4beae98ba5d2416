#pragma once

#include "../../core/score_matching.h"
#include "sums.h"
#include "tile.h"

namespace emd::cpu::EMD_ISA {
namespace {

void score_matching_loss(const ScoreMatchingLoss& op, double* partial, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; i++) {
    const Tile tile = sample_tile(op.shape, i);
    Buffer output_buffer, x0_buffer, x_t_buffer;
    const float* output = read(op.output, tile, op.shape.elements, output_buffer);
    const float* x0 = read(op.x0, tile, op.shape.elements, x0_buffer);
    const float* x_t = read(op.x_t, tile, op.shape.elements, x_t_buffer);
    const float c_skip = number_of(op.c_skip, tile.sample), c_out = number_of(op.c_out, tile.sample);
    partial[i] = sum<double>(tile.count, [=](int64_t e) {
      const double error = denoising_error(output[e], x0[e], x_t[e], c_skip, c_out);
      return error * error;
    });
  }
}

void score_matching_gradient(const ScoreMatchingGradient& op, int64_t first, int64_t last) {
  for_tiles(op.shape, first, last, [&](const Tile& tile) {
    Buffer output_buffer, x0_buffer, x_t_buffer, out_buffer;
    const float* output = read(op.output, tile, op.shape.elements, output_buffer);
    const float* x0 = read(op.x0, tile, op.shape.elements, x0_buffer);
    const float* x_t = read(op.x_t, tile, op.shape.elements, x_t_buffer);
    float* out = begin(op.out, tile, out_buffer);
    const int64_t n = tile.size();
    const float elements = float(op.shape.elements);
    with_numbers(
        tile,
        [=](auto grad, auto weight, auto c_skip, auto c_out) {
#pragma omp simd
          for (int64_t i = 0; i < n; i++) {
            const float error = denoising_error(output[i], x0[i], x_t[i], at(c_skip, i), at(c_out, i));
            out[i] = product(denoising_gradient_factor(at(grad, i), at(weight, i), at(c_out, i), elements), error);
          }
        },
        op.grad, op.weight, op.c_skip, op.c_out);
    finish(op.out, tile, out);
  });
}

}  // namespace
}  // namespace emd::cpu::EMD_ISA
