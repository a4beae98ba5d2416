// Instructions of the chip that C++ has no words for: dynamic shared memory, asynchronous copies,
// clusters, approximate functions. The emulator of the tests has the same functions.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#if !defined(__CUDACC__)
#include <emulated_chip.h>
#else

namespace emd::cuda {

__device__ inline char* dynamic_shared() {
  extern __shared__ uint4 emd_dynamic_shared[];
  return reinterpret_cast<char*>(emd_dynamic_shared);
}

// Copies 16 bytes to shared memory without a register. The copying thread sees them after
// wait_for_copies; other threads see them after a barrier too.
__device__ inline void copy_16(void* shared, const void* global) {
  const uint32_t to = uint32_t(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}

// One store of 16 bytes. nvcc splits some of those that are written as an assignment.
__device__ inline void store_16(void* global, const uint4& words) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(global), "r"(words.x), "r"(words.y), "r"(words.z),
               "r"(words.w)
               : "memory");
}

// Ends a stage of copies.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// The same number, which the compiler takes for another one: what depends on it is computed again, and
// takes no register in between.
__device__ inline uint32_t computed_anew(uint32_t value) {
  asm volatile("" : "+r"(value));
  return value;
}

// Waits until at most `kLater` stages are under way.
template <int kLater>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLater) : "memory");
}

// Barrier of all threads of the blocks of a cluster, in two halves. What was written before the
// arrival is visible to all after the wait, unless `kWrites` is false, which spares a memory barrier.
template <bool kWrites>
__device__ inline void arrive_at_cluster() {
#if __CUDA_ARCH__ >= 900
  if constexpr (kWrites) {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  } else {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
  }
#endif
}
__device__ inline void wait_for_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// Reads a number in the shared memory of another block of the cluster, at the address that it has
// in this block.
__device__ inline float of_block(const float* shared, uint32_t rank) {
#if __CUDA_ARCH__ >= 900
  const uint32_t mine = uint32_t(__cvta_generic_to_shared(shared));
  uint32_t there;
  float value;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(mine), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(there) : "memory");
  return value;
#else
  return *shared;
#endif
}

// 2^x to two units in the last place; 0 and not a denormal number, infinity where it overflows.
__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x to one unit in the last place; 0 and not a denormal number.
__device__ inline float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace emd::cuda

#endif
