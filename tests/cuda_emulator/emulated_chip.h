// The functions of csrc/cuda/chip.cuh on a CPU. The approximate ones are off by as much as NVIDIA permits them to be.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

namespace emd::cuda {

inline char* dynamic_shared() {
  return reinterpret_cast<char*>(emulator::machine.shared[emulator::machine.rank()].data());
}

inline void copy_16(void* shared, const void* global) {
  *static_cast<uint4*>(shared) = *static_cast<const uint4*>(global);
}
inline void store_16(void* global, const uint4& words) { *static_cast<uint4*>(global) = words; }
inline void commit_copies() {}
template <int kLater>
void wait_for_copies() {}

inline uint32_t computed_anew(uint32_t value) { return value; }

template <bool kWrites>
void arrive_at_cluster() {}
inline void wait_for_cluster() { emulator::wait(emulator::machine.cluster); }

inline float of_block(const float* shared, uint32_t rank) {
  const char* mine = dynamic_shared();
  const char* there = reinterpret_cast<const char*>(emulator::machine.shared[rank].data());
  return *reinterpret_cast<const float*>(there + (reinterpret_cast<const char*>(shared) - mine));
}

// `exact` rounded to float, and moved by -most to most units in the last place; which, the bits of the argument tell.
inline float off_by(double exact, float argument, int most) {
  float value = float(exact);
  uint32_t bits;
  memcpy(&bits, &argument, sizeof bits);
  const int by = int((bits * 2654435761u >> 16) % uint32_t(2 * most + 1)) - most;
  for (int i = 0; i < (by < 0 ? -by : by); i++) value = nextafterf(value, by < 0 ? -INFINITY : INFINITY);
  return fabsf(value) < 0x1p-126f ? copysignf(0.0f, value) : value;
}

inline float exp2_approx(float x) {
  const double exact = exp2(double(x));
  return isfinite(exact) && exact < 0x1p127 && x != 0 ? off_by(exact, x, 2) : float(exact);
}
inline float reciprocal_approx(float x) { return isfinite(x) && x != 0 ? off_by(1.0 / double(x), x, 1) : 1.0f / x; }

}  // namespace emd::cuda
