// Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC
// 2011).
#pragma once

#include <stdint.h>

#include "macros.h"

namespace emd {

struct Words {
  uint32_t w0, w1, w2, w3;
};

struct Halves {
  uint32_t low, high;
};

EMD_HD Halves multiply(uint32_t a, uint32_t b) {
  uint64_t product;
#if defined(__CUDA_ARCH__)
  // One instruction gives both halves. The compiler would multiply twice.
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
#else
  product = uint64_t{a} * b;
#endif
  return {uint32_t(product), uint32_t(product >> 32)};
}

EMD_HD Words philox_round(Words c, uint32_t k0, uint32_t k1) {
  const Halves a = multiply(c.w0, 0xD2511F53u), b = multiply(c.w2, 0xCD9E8D57u);
  return {b.high ^ c.w1 ^ k0, b.low, a.high ^ c.w3 ^ k1, a.low};
}

EMD_HD Words philox(Words counter, uint32_t k0, uint32_t k1) {
  constexpr uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;
  // Unrolled by hand: a loop here would prevent vectorization of the surrounding loop over blocks.
  Words c = philox_round(counter, k0, k1);
  c = philox_round(c, k0 + 1 * kWeyl0, k1 + 1 * kWeyl1);
  c = philox_round(c, k0 + 2 * kWeyl0, k1 + 2 * kWeyl1);
  c = philox_round(c, k0 + 3 * kWeyl0, k1 + 3 * kWeyl1);
  c = philox_round(c, k0 + 4 * kWeyl0, k1 + 4 * kWeyl1);
  c = philox_round(c, k0 + 5 * kWeyl0, k1 + 5 * kWeyl1);
  c = philox_round(c, k0 + 6 * kWeyl0, k1 + 6 * kWeyl1);
  c = philox_round(c, k0 + 7 * kWeyl0, k1 + 7 * kWeyl1);
  c = philox_round(c, k0 + 8 * kWeyl0, k1 + 8 * kWeyl1);
  return philox_round(c, k0 + 9 * kWeyl0, k1 + 9 * kWeyl1);
}

}  // namespace emd
