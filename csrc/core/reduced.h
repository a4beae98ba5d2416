// bfloat16 and float16, and conversions from and to float32. Rounding is to nearest, ties to even.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include "arithmetic.h"
#include "macros.h"

namespace emd {

struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

EMD_HD float to_float(float x) { return x; }

EMD_HD float to_float(Bfloat16 x) { return float_of(uint32_t{x.bits} << 16); }

// Branch-free: a product shifts the exponent of a normal number, and a subnormal number is an
// integer times 2^-24. CPUs have an instruction for it, but GCC does not vectorize loops with it.
// Rows that are converted as a whole use it (cpu/kernels/types.h).
EMD_HD float to_float(Float16 x) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(x.bits));
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
#if defined(__CUDA_ARCH__)
  out.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
#else
  const uint32_t bits = bits_of(x), quiet_nan = x != x ? 0x7fc00000u : 0u;
  out.bits = uint16_t(((bits + 0x7fffu + ((bits >> 16) & 1u)) | quiet_nan) >> 16);
#endif
}

EMD_HD void from_float(float x, Float16& out) {
#if defined(__CUDA_ARCH__)
  out.bits = __half_as_ushort(__float2half_rn(x));
#else
  const uint32_t sign = (bits_of(x) >> 16) & 0x8000u;
  const uint32_t magnitude = bits_of(x) & 0x7fffffffu;
  // Adding 1/2 leaves a multiple of 2^-24 in the low bits. The float32 addition rounds it
  // correctly.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t large = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  out.bits = uint16_t((magnitude >= 0x477ff000u ? large : finite) | sign);
#endif
}

}  // namespace emd
