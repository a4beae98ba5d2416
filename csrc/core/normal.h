// Uniform and normal numbers from random words (Box and Muller, 1958).
#pragma once

#include <math.h>
#include <stdint.h>

#include "arithmetic.h"
#include "macros.h"

namespace emd {

// A number in the open interval (0, 1), from 2^-33 to 1 - 2^-24.
EMD_HD float uniform_from_word(uint32_t word) {
  const float u = exact_product_plus(float(word), 0x1p-32f, 0x1p-33f);
  return u < 0x1.fffffep-1f ? u : 0x1.fffffep-1f;
}

// -2 ln u for a normal float32 u in (0, 1), to 3 units in the last place. u = 2^e (1 + f), with f
// from sqrt(1/2) - 1 to sqrt(2) - 1, so that the exponent is 0 near u = 1 and nothing cancels.
EMD_HD float minus_two_log(float u) {
  const uint32_t kSqrtHalf = 0x3f3504f3u;
  const int32_t exponent = int32_t(bits_of(u) - kSqrtHalf) >> 23;
  const float f = float_of(bits_of(u) - (uint32_t(exponent) << 23)) - 1.0f;
  // Minimax polynomial for -2 ln(1 + f) / f, exact at 0. The relative error is 3e-8.
  float q = fused(-0.17469682196967065f, f, 0.2861504192418942f);
  q = fused(q, f, -0.2983594788295583f);
  q = fused(q, f, 0.33141016570607984f);
  q = fused(q, f, -0.39924144228250247f);
  q = fused(q, f, 0.5000351049897187f);
  q = fused(q, f, -0.6666790044418094f);
  q = fused(q, f, 0.999999832128506f);
  q = fused(q, f, -2.0f);
  return fused(float(exponent), -1.3862943611198906f, q * f);
}

struct Pair {
  float first, second;
};

// (cos, sin)(2 pi u) for u in [0, 1]. The angle stays in revolutions, where the subtraction of
// quarter turns is exact. In radians it would not be.
EMD_HD Pair cos_sin_of_revolutions(float u) {
  const float kRound = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
  const float shifted = fused(u, 4.0f, kRound);
  const uint32_t quarter = bits_of(shifted);
  const float r = fused(shifted - kRound, -0.25f, u);  // |r| <= 1/8, exact
  const float y = r * r;
  // Minimax polynomials for sin(2 pi r) / r (relative error 3e-9) and cos(2 pi r) (absolute error
  // 3e-8).
  float s = fused(-75.39356282213731f, y, 81.5923535548803f);
  s = fused(s, y, -41.341661454923866f);
  s = fused(s, y, 6.283185286833361f) * r;
  float c = fused(-83.66592100384119f, y, 64.92322864598019f);
  c = fused(c, y, -19.73916726349807f);
  c = fused(c, y, 1.0f);
  const uint32_t swap = 0u - (quarter & 1u);
  const uint32_t s_bits = bits_of(s), c_bits = bits_of(c);
  const uint32_t differing = (s_bits ^ c_bits) & swap;
  return {float_of((c_bits ^ differing) ^ (((quarter + 1u) & 2u) << 30)),
          float_of((s_bits ^ differing) ^ ((quarter & 2u) << 30))};
}

EMD_HD Pair normal_pair(uint32_t word0, uint32_t word1) {
  const float radius = square_root(minus_two_log(uniform_from_word(word0)));
  const Pair direction = cos_sin_of_revolutions(uniform_from_word(word1));
  return {radius * direction.first, radius * direction.second};
}

}  // namespace emd
