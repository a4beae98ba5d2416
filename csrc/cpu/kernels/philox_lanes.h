// Vectorized Philox for many counters.
//
// Each 32-bit word is in the low half of a 64-bit lane. The fast multiplication that gives both
// halves of a product reads the low halves only, so the contents of the high halves do not matter.
// A round takes two products, two shifts and two exclusive ors per vector.
#pragma once

#include <stdint.h>

#include "../../core/philox.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace emd::cpu::EMD_ISA {
namespace {

#if defined(__AVX512F__)
using Lanes = __m512i;
constexpr int kLanes = 8;
EMD_HD Lanes all_lanes(uint32_t a) { return _mm512_set1_epi64(a); }
EMD_HD Lanes load_lanes(const uint32_t* p) {
  return _mm512_cvtepu32_epi64(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
EMD_HD void store_lanes(uint32_t* p, Lanes a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi64_epi32(a));
}
EMD_HD Lanes multiply(Lanes a, Lanes b) { return _mm512_mul_epu32(a, b); }
EMD_HD Lanes high_half(Lanes a) { return _mm512_srli_epi64(a, 32); }
EMD_HD Lanes exclusive_or(Lanes a, Lanes b, Lanes c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
#elif defined(__AVX2__)
using Lanes = __m256i;
constexpr int kLanes = 4;
EMD_HD Lanes all_lanes(uint32_t a) { return _mm256_set1_epi64x(a); }
EMD_HD Lanes load_lanes(const uint32_t* p) {
  return _mm256_cvtepu32_epi64(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
EMD_HD void store_lanes(uint32_t* p, Lanes a) {
  const Lanes even = _mm256_permutevar8x32_epi32(a, _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(even));
}
EMD_HD Lanes multiply(Lanes a, Lanes b) { return _mm256_mul_epu32(a, b); }
EMD_HD Lanes high_half(Lanes a) { return _mm256_srli_epi64(a, 32); }
EMD_HD Lanes exclusive_or(Lanes a, Lanes b, Lanes c) { return _mm256_xor_si256(_mm256_xor_si256(b, c), a); }
#elif defined(__SSE2__)
using Lanes = __m128i;
constexpr int kLanes = 2;
EMD_HD Lanes all_lanes(uint32_t a) { return _mm_set1_epi64x(a); }
EMD_HD Lanes load_lanes(const uint32_t* p) {
  return _mm_unpacklo_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)), _mm_setzero_si128());
}
EMD_HD void store_lanes(uint32_t* p, Lanes a) {
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_shuffle_epi32(a, 0x88));
}
EMD_HD Lanes multiply(Lanes a, Lanes b) { return _mm_mul_epu32(a, b); }
EMD_HD Lanes high_half(Lanes a) { return _mm_srli_epi64(a, 32); }
EMD_HD Lanes exclusive_or(Lanes a, Lanes b, Lanes c) { return _mm_xor_si128(_mm_xor_si128(b, c), a); }
#endif

constexpr int kBlocks = 32;  // blocks of four words per call

// word[i][l] is word i of the block whose counter is (c0[l], c1[l], c2, c3).
inline void philox_blocks(const uint32_t* c0, const uint32_t* c1, uint32_t c2, uint32_t c3, uint32_t key0,
                          uint32_t key1, uint32_t (*word)[kBlocks]) {
#if defined(__SSE2__)
  constexpr int kGroups = 4;  // independent dependency chains, to hide the latency of the products
  const Lanes m0 = all_lanes(0xD2511F53u), m1 = all_lanes(0xCD9E8D57u);
  for (int l = 0; l < kBlocks; l += kGroups * kLanes) {
    Lanes w0[kGroups], w1[kGroups], w2[kGroups], w3[kGroups];
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; g++) {
      w0[g] = load_lanes(c0 + l + g * kLanes);
      w1[g] = load_lanes(c1 + l + g * kLanes);
      w2[g] = all_lanes(c2);
      w3[g] = all_lanes(c3);
    }
    uint32_t k0 = key0, k1 = key1;
#pragma GCC unroll 10
    for (int round = 0; round < 10; round++) {
      const Lanes round_key0 = all_lanes(k0), round_key1 = all_lanes(k1);
#pragma GCC unroll 4
      for (int g = 0; g < kGroups; g++) {
        const Lanes p0 = multiply(w0[g], m0), p1 = multiply(w2[g], m1);
        w0[g] = exclusive_or(w1[g], round_key0, high_half(p1));
        w1[g] = p1;
        w2[g] = exclusive_or(w3[g], round_key1, high_half(p0));
        w3[g] = p0;
      }
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; g++) {
      store_lanes(word[0] + l + g * kLanes, w0[g]);
      store_lanes(word[1] + l + g * kLanes, w1[g]);
      store_lanes(word[2] + l + g * kLanes, w2[g]);
      store_lanes(word[3] + l + g * kLanes, w3[g]);
    }
  }
#else
#pragma omp simd
  for (int l = 0; l < kBlocks; l++) {
    const Words w = philox({c0[l], c1[l], c2, c3}, key0, key1);
    word[0][l] = w.w0;
    word[1][l] = w.w1;
    word[2][l] = w.w2;
    word[3][l] = w.w3;
  }
#endif
}

}  // namespace
}  // namespace emd::cpu::EMD_ISA
