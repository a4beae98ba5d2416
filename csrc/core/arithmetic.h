// Arithmetic with the same roundings on every machine, and access to the bits of a float.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "macros.h"

namespace emd {

EMD_HD uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

EMD_HD float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// a * b, never contracted to a fused multiply-add: two equal network outputs must give a
// difference of exactly 0. The CPU build disables contraction for all code with -ffp-contract=off.
EMD_HD float product(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

// a * b + c for finite numbers, with one rounding.
EMD_HD float fused(float a, float b, float c) {
#if defined(__CUDA_ARCH__) || defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return fmaf(a, b, c);
#else
  // Without the instruction, fmaf is a library call, which prevents vectorization. The product is
  // exact in float64. The float64 sum is rounded to odd (Boldo and Melquiond, 2008), so that the
  // rounding to float32 gives the correctly rounded result. Integer operations replace
  // comparisons, because SSE2 cannot compare 64-bit lanes.
  const double product = double(a) * double(b);
  const double sum = product + double(c);
  const double back = sum - product;
  const double error = (product - (sum - back)) + (double(c) - back);
  uint64_t sum_bits, error_bits;
  memcpy(&sum_bits, &sum, sizeof sum);
  memcpy(&error_bits, &error, sizeof error);
  const uint64_t magnitude = error_bits & 0x7fffffffffffffffull;
  const uint64_t inexact = (magnitude | (0 - magnitude)) >> 63;
  const uint64_t step = 1 - 2 * ((sum_bits ^ error_bits) >> 63);
  sum_bits += step & (0 - (inexact & ~sum_bits & 1));
  double odd;
  memcpy(&odd, &sum_bits, sizeof odd);
  return float(odd);
#endif
}

// a * b + c for an exact product. Both branches round once.
EMD_HD float exact_product_plus(float a, float b, float c) {
#if defined(__CUDA_ARCH__) || defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// sqrt(x) for a normal number. It is correctly rounded on a CPU. On a GPU the relative error is
// 2^-23, because a correctly rounded root costs eight times as much.
EMD_HD float square_root(float x) {
#if defined(__CUDA_ARCH__)
  float root;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(x));
  return root;
#else
  return sqrtf(x);
#endif
}

}  // namespace emd
