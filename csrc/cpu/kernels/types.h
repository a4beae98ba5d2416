// Conversion of rows between float32 and the reduced types.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "../../core/arithmetic.h"
#include "../kernels.h"

namespace emd::cpu::EMD_ISA {
namespace {

struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

EMD_HD float to_float(float x) { return x; }

EMD_HD float to_float(Bfloat16 x) { return float_of(uint32_t{x.bits} << 16); }

// Branch-free: a normal number moves its exponent by a product, a subnormal one is an integer times 2^-24.
EMD_HD float to_float(Float16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  const uint32_t sign = (uint32_t{x.bits} & 0x8000u) << 16;
  const uint32_t magnitude = uint32_t{x.bits} & 0x7fffu;
  const float normal = float_of((magnitude << 13) + 0x70000000u) * 0x1p-112f;
  const float subnormal = float(int32_t(magnitude)) * 0x1p-24f;
  return float_of(bits_of(magnitude < 0x400u ? subnormal : normal) | sign);
#endif
}

EMD_HD void from_float(float x, float& out) { out = x; }

EMD_HD void from_float(float x, Bfloat16& out) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  out.bits = uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

EMD_HD void from_float(float x, Float16& out) {
#if defined(__F16C__)
  out.bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
  const uint32_t sign = (bits_of(x) >> 16) & 0x8000u;
  const uint32_t magnitude = bits_of(x) & 0x7fffffffu;
  // Adding 1/2 leaves a multiple of 2^-24 in the low bits, rounded as float32 rounds: to nearest, ties to even.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t large = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  out.bits = uint16_t((magnitude >= 0x477ff000u ? large : finite) | sign);
#endif
}

template <class T>
inline void row_to_float(const T* row, int64_t n, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) out[i] = to_float(row[i]);
}

template <class T>
inline void row_from_float(const float* row, int64_t n, T* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) from_float(row[i], out[i]);
}

#if defined(__F16C__)
// GCC does not vectorise the conversions of half precision by itself.
inline void row_to_float(const Float16* row, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row + i))));
  }
  for (; i < n; i++) out[i] = to_float(row[i]);
}

inline void row_from_float(const float* row, int64_t n, Float16* out) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(row + i), _MM_FROUND_TO_NEAREST_INT));
  }
  for (; i < n; i++) from_float(row[i], out[i]);
}
#endif

// The elements [at, at + n) of a dense array as float32: in place where they are, otherwise in the buffer.
inline const float* read_row(const void* data, Type type, int64_t at, int64_t n, float* buffer) {
  switch (type) {
    case Type::float32: return static_cast<const float*>(data) + at;
    case Type::bfloat16: row_to_float(static_cast<const Bfloat16*>(data) + at, n, buffer); break;
    case Type::float16: row_to_float(static_cast<const Float16*>(data) + at, n, buffer); break;
  }
  return buffer;
}

// Where to compute the elements from `at` on: in place, or in the buffer that finish_row converts.
inline float* begin_row(void* data, Type type, int64_t at, float* buffer) {
  return type == Type::float32 ? static_cast<float*>(data) + at : buffer;
}

inline void finish_row(void* data, Type type, int64_t at, int64_t n, const float* row) {
  switch (type) {
    case Type::float32: break;
    case Type::bfloat16: row_from_float(row, n, static_cast<Bfloat16*>(data) + at); break;
    case Type::float16: row_from_float(row, n, static_cast<Float16*>(data) + at); break;
  }
}

}  // namespace
}  // namespace emd::cpu::EMD_ISA
