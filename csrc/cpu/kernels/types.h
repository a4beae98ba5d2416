// Conversion of rows between float32 and the reduced types.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "../../core/reduced.h"
#include "../kernels.h"

namespace emd::cpu::EMD_ISA {
namespace {

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
// GCC does not vectorize the float16 conversions by itself.
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

// Calls function with a value of the type.
template <class Function>
inline void with_type(Type type, Function function) {
  switch (type) {
    case Type::float32: return function(float());
    case Type::bfloat16: return function(Bfloat16());
    case Type::float16: return function(Float16());
  }
}

// Elements [at, at + n) of a contiguous array as float32: a pointer to the array if it is float32,
// else to the buffer.
inline const float* read_row(const void* data, Type type, int64_t at, int64_t n, float* buffer) {
  switch (type) {
    case Type::float32: return static_cast<const float*>(data) + at;
    case Type::bfloat16: row_to_float(static_cast<const Bfloat16*>(data) + at, n, buffer); break;
    case Type::float16: row_to_float(static_cast<const Float16*>(data) + at, n, buffer); break;
  }
  return buffer;
}

// Destination for the elements from `at` on: the array if it is float32, else the buffer, which
// finish_row converts.
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
