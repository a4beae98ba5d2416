// silu(y) = y sigmoid(y) and its derivative.
#pragma once

#include "arithmetic.h"
#include "macros.h"

namespace emd {

// exp(-|y|) with a relative error of 2e-7. It is constant from |y| = 87 on, which is enough for a
// sigmoid and avoids denormals. The minimum is taken of the bits as integers, which order as
// positive floats do: for floats GCC emits a comparison and a select.
EMD_HD float exp_of_minus_abs(float y) {
  const int32_t magnitude = int32_t(bits_of(y) & 0x7fffffffu), bound = 0x42ae0000;  // 87.0f
  const float bounded = float_of(uint32_t(magnitude < bound ? magnitude : bound));
  const float kRound = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
  const float shifted = fused(bounded, -1.4426950408889634f, kRound);
  const float minus_r = fused(shifted - kRound, 0.6931471805599453f, bounded);
  // Minimax polynomial for exp(r), exact at 0. The relative error is 9e-8.
  float p = fused(-0.008290314633014512f, minus_r, 0.04189792933697198f);
  p = fused(p, minus_r, -0.16667636196119506f);
  p = fused(p, minus_r, 0.4999914953028628f);
  p = fused(p, minus_r, -0.9999997071890454f);
  p = fused(p, minus_r, 1.0f);
  return float_of(bits_of(p) + (bits_of(shifted) << 23));
}

// A select by the sign bit takes one instruction and no comparison.
EMD_HD bool is_negative(float y) { return int32_t(bits_of(y)) < 0; }

EMD_HD float silu(float y) {
  const float e = exp_of_minus_abs(y);
  return (is_negative(y) ? y * e : y) / (1.0f + e);
}

EMD_HD float silu_derivative(float y) {
  const float e = exp_of_minus_abs(y);
  const float sigmoid = (is_negative(y) ? e : 1.0f) / (1.0f + e);
  return sigmoid * fused(y, 1.0f - sigmoid, 1.0f);
}

}  // namespace emd
