// Enough of CUDA for a C++ compiler to build the kernels of csrc/cuda and for a CPU to run them: the threads of a block
// take turns, each until the next barrier, and the blocks follow one another.
#pragma once

#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)

struct CUstream_st;
using cudaStream_t = CUstream_st*;
using cudaError_t = int;
inline const char* cudaGetErrorString(cudaError_t) { return "emulated"; }

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1) : x(x) {}
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

namespace emulator {

constexpr int kMaxThreads = 1024;
constexpr size_t kStack = 128 * 1024;

struct Block {
  ucontext_t scheduler, thread[kMaxThreads];
  std::vector<std::unique_ptr<char[]>> stacks;
  bool done[kMaxThreads];
  uint32_t exchanged[kMaxThreads];
  std::function<void()> kernel;
};

inline Block block;
inline std::mutex running;
inline dim3 thread_index, block_index;

inline void thread_main() {
  block.kernel();
  block.done[thread_index.x] = true;
}

inline void barrier() {
  const dim3 me = thread_index;
  swapcontext(&block.thread[me.x], &block.scheduler);
  thread_index = me;
}

inline void run_block(int threads) {
  while (int(block.stacks.size()) < threads) block.stacks.push_back(std::make_unique<char[]>(kStack));
  for (int i = 0; i < threads; i++) {
    getcontext(&block.thread[i]);
    block.thread[i].uc_stack.ss_sp = block.stacks[i].get();
    block.thread[i].uc_stack.ss_size = kStack;
    block.thread[i].uc_link = &block.scheduler;
    makecontext(&block.thread[i], thread_main, 0);
    block.done[i] = false;
  }
  for (int left = threads; left > 0;) {
    for (int i = 0; i < threads; i++) {
      if (block.done[i]) continue;
      thread_index.x = unsigned(i);
      swapcontext(&block.scheduler, &block.thread[i]);
      left -= block.done[i];
    }
  }
}

}  // namespace emulator

#define threadIdx (emulator::thread_index)
#define blockIdx (emulator::block_index)

inline void __syncthreads() { emulator::barrier(); }

inline float __shfl_xor_sync(unsigned, float value, int distance) {
  const unsigned me = threadIdx.x;
  memcpy(&emulator::block.exchanged[me], &value, sizeof value);
  emulator::barrier();
  memcpy(&value, &emulator::block.exchanged[me ^ unsigned(distance)], sizeof value);
  emulator::barrier();
  return value;
}

inline uint32_t __umulhi(uint32_t a, uint32_t b) { return uint32_t((uint64_t{a} * b) >> 32); }

inline uint4 __ldg(const uint4* from) { return *from; }

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  const std::lock_guard<std::mutex> lock(emulator::running);
  emulator::block.kernel = [&] { kernel(arguments...); };
  for (unsigned b = 0; b < config->gridDim.x; b++) {
    emulator::block_index.x = b;
    emulator::run_block(int(config->blockDim.x));
  }
  return 0;
}
