// silu(y) = y sigmoid(y) and its derivative.
#pragma once

#include "arithmetic.h"
#include "macros.h"

namespace emd {

// exp(-y), relative error 2e-7, for |y| <= 87; constant outside: far enough for a sigmoid, and no denormals.
EMD_HD float clamped_exp_of_minus(float y) {
  y = y < 87.0f ? y : 87.0f;
  y = y > -87.0f ? y : -87.0f;
  const float kRound = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
  const float shifted = fused(y, -1.4426950408889634f, kRound);
  const float minus_r = fused(shifted - kRound, 0.6931471805599453f, y);
  // Minimax for exp(r) with the value at 0 exact; relative error 9e-8.
  float p = fused(-0.008290314633014512f, minus_r, 0.04189792933697198f);
  p = fused(p, minus_r, -0.16667636196119506f);
  p = fused(p, minus_r, 0.4999914953028628f);
  p = fused(p, minus_r, -0.9999997071890454f);
  p = fused(p, minus_r, 1.0f);
  return float_of(bits_of(p) + (bits_of(shifted) << 23));
}

EMD_HD float silu(float y) { return y / (1.0f + clamped_exp_of_minus(y)); }

EMD_HD float silu_derivative(float y) {
  const float sigmoid = 1.0f / (1.0f + clamped_exp_of_minus(y));
  return sigmoid * fused(y, 1.0f - sigmoid, 1.0f);
}

}  // namespace emd
