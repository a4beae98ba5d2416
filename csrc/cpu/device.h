// The CPU as a device of csrc/ops.
#pragma once

#include "../tensors.h"
#include "kernels.h"
#include "memory.h"
#include "parallel.h"

namespace emd::cpu {

// Minimum number of tiles per thread. With fewer, waking a thread costs more than it saves.
// (Measured: 5 us to wake a thread, 0.5 us for a tile with noise, 0.1 us for one without.)
constexpr int64_t kNoisyTiles = 16, kPlainTiles = 64;

struct Cpu {
  static at::Tensor empty(at::IntArrayRef size, at::ScalarType dtype, const Call&) {
    return with_huge_pages(at::empty(size, dtype));
  }

  static void run(const Uniform& op, const Call&) { tiles(kernels().uniform, op, kNoisyTiles); }
  static void run(const Normal& op, const Call&) { tiles(kernels().normal, op, kNoisyTiles); }
  static void run(const Perturb& op, const Call&) {
    tiles(kernels().perturb, op, op.draws ? kNoisyTiles : kPlainTiles);
  }
  static void run(const LangevinEps& op, const Call&) { tiles(kernels().langevin_eps, op, kNoisyTiles); }
  static void run(const LangevinZ& op, const Call&) { tiles(kernels().langevin_z, op, kNoisyTiles); }
  static void run(const MStepLoss& op, const Call&) { means(kernels().m_step_loss, op, 0.5); }
  static void run(const MStepGradient& op, const Call&) { tiles(kernels().m_step_gradient, op, kPlainTiles); }
  static void run(const ScoreMatchingLoss& op, const Call&) { means(kernels().score_matching_loss, op, 1.0); }
  static void run(const ScoreMatchingGradient& op, const Call&) {
    tiles(kernels().score_matching_gradient, op, kPlainTiles);
  }

 private:
  template <class Op>
  static void tiles(void (*kernel)(const Op&, int64_t, int64_t), const Op& op, int64_t grain) {
    in_parallel(tiles_of(op.shape), grain, kernel, op);
  }

  // loss = weight * factor * sum / elements. The sums of the tiles are added in a fixed order. The
  // loss of an empty sample is NaN, as the mean of an empty tensor in torch.
  template <class Op>
  static void means(void (*kernel)(const Op&, double*, int64_t, int64_t), const Op& op, double factor) {
    const int64_t parts = tiles_per_sample(op.shape);
    std::vector<double> partial(op.shape.samples * parts);
    at::parallel_for(0, int64_t(partial.size()), kPlainTiles,
                     [&](int64_t first, int64_t last) { kernel(op, partial.data(), first, last); });
    for (int64_t s = 0; s < op.shape.samples; s++) {
      double sum = 0;
      for (int64_t p = 0; p < parts; p++) sum += partial[s * parts + p];
      op.loss[s] = float(double(number_of(op.weight, s)) * factor * (sum / double(op.shape.elements)));
    }
  }
};

}  // namespace emd::cpu
