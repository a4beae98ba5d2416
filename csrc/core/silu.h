// silu(y) = y sigmoid(y) and its derivative.
#pragma once

#include "arithmetic.h"
#include "macros.h"

namespace emd {

// exp(x) to 2 units in the last place for |x| <= 87, constant outside: far enough for a sigmoid, and no denormals.
EMD_HD float clamped_exp(float x) {
  x = x < 87.0f ? x : 87.0f;
  x = x > -87.0f ? x : -87.0f;
  const float kRound = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
  const float shifted = fused(x, 1.4426950408889634f, kRound);
  const float n = shifted - kRound;
  const float r = fused(n, -1.42860677e-6f, fused(n, -0.693145752f, x));  // ln 2 in two parts, the first of 17 bits
  // Minimax with the value at 0 exact; relative error 2e-9.
  float p = fused(0.0013843653491156455f, r, 0.00837415531744062f);
  p = fused(p, r, 0.041668002036388735f);
  p = fused(p, r, 0.16666431262525794f);
  p = fused(p, r, 0.49999994209040204f);
  p = fused(p, r, 1.000000032165083f);
  p = fused(p, r, 1.0f);
  return float_of(bits_of(p) + (bits_of(shifted) << 23));
}

EMD_HD float silu(float y) { return y / (1.0f + clamped_exp(-y)); }

EMD_HD float silu_derivative(float y) {
  const float sigmoid = 1.0f / (1.0f + clamped_exp(-y));
  return sigmoid * fused(y, 1.0f - sigmoid, 1.0f);
}

}  // namespace emd
