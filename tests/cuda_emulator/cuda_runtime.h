// Enough of CUDA for a C++ compiler to build the kernels of csrc/cuda and for a CPU to run them: the threads of a
// cluster of blocks take turns, each until a barrier at which others are missing, and the clusters follow one another.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static  // only in kernels without clusters
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
struct alignas(8) float2 {
  float x, y;
};

enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

// The sizes of the emulated chip: EMD_EMULATED_CHIP is "major,bytes of a block,bytes of a multiprocessor".
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor
};
inline cudaError_t cudaGetDevice(int* device) { return *device = 0; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  int numbers[3] = {9, 227 * 1024, 228 * 1024};  // an H200
  if (const char* given = getenv("EMD_EMULATED_CHIP")) {
    if (sscanf(given, "%d,%d,%d", &numbers[0], &numbers[1], &numbers[2]) != 3) return 1;
  }
  *value = numbers[which];
  return 0;
}

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int bytes) {
  int most = 0;
  cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0);
  return bytes > most;
}

namespace emulator {

constexpr size_t kStack = 64 * 1024;

// Threads wait here until all that are alive have arrived.
struct Barrier {
  unsigned arrived = 0, alive = 0, generation = 0;

  void release() {
    if (arrived < alive) return;
    arrived = 0;
    generation++;
  }
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  bool done;
  unsigned index, block;           // in its block; of the block in the grid
  const Barrier* barrier;          // that the thread waits at, if its generation is `generation`
  unsigned generation;
  uint32_t exchanged;              // by a shuffle
};

struct Machine {
  ucontext_t scheduler;
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Barrier> warps, blocks;
  Barrier cluster;
  std::vector<std::vector<uint4>> shared;  // dynamic shared memory of each block
  unsigned of_block, warps_of_block, first_block;
  std::function<void()> kernel;
  Thread* now;

  unsigned rank() const { return now->block - first_block; }
  Barrier& block() { return blocks[rank()]; }
  Barrier& warp() { return warps[rank() * warps_of_block + now->index / 32]; }
};

inline Machine machine;
inline std::mutex running;
inline dim3 thread_index, block_index;

inline void wait(Barrier& barrier) {
  Thread* me = machine.now;
  me->barrier = &barrier;
  me->generation = barrier.generation;
  barrier.arrived++;
  barrier.release();
  if (barrier.generation == me->generation) swapcontext(&me->context, &machine.scheduler);
}

inline void thread_main() {
  machine.kernel();
  machine.now->done = true;
  for (Barrier* barrier : {&machine.warp(), &machine.block(), &machine.cluster}) {
    barrier->alive--;
    if (barrier->arrived) barrier->release();
  }
}

inline void run_cluster(unsigned first_block, unsigned blocks, unsigned threads, size_t shared) {
  const unsigned all = blocks * threads, warps = (threads + 31) / 32;
  while (machine.threads.size() < all) machine.threads.push_back(std::make_unique<Thread>());
  machine.of_block = threads;
  machine.warps_of_block = warps;
  machine.first_block = first_block;
  machine.warps.assign(blocks * warps, {});
  machine.blocks.assign(blocks, {});
  machine.cluster = {};
  // Filled with NaN: what nobody has written shows.
  machine.shared.assign(blocks, std::vector<uint4>((shared + 15) / 16, uint4{~0u, ~0u, ~0u, ~0u}));
  for (unsigned i = 0; i < all; i++) {
    Thread& thread = *machine.threads[i];
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStack;
    thread.context.uc_link = &machine.scheduler;
    makecontext(&thread.context, thread_main, 0);
    thread.done = false;
    thread.barrier = nullptr;
    thread.index = i % threads;
    thread.block = first_block + i / threads;
    machine.warps[i / threads * warps + thread.index / 32].alive++;
    machine.blocks[i / threads].alive++;
    machine.cluster.alive++;
  }
  for (unsigned left = all; left > 0;) {
    bool stuck = true;
    for (unsigned i = 0; i < all; i++) {
      Thread& thread = *machine.threads[i];
      if (thread.done || (thread.barrier && thread.barrier->generation == thread.generation)) continue;
      stuck = false;
      machine.now = &thread;
      thread_index.x = thread.index;
      block_index.x = thread.block;
      swapcontext(&machine.scheduler, &thread.context);
      left -= thread.done;
    }
    if (stuck) abort();  // not all threads of a barrier reach it
  }
}

}  // namespace emulator

#define threadIdx (emulator::thread_index)
#define blockIdx (emulator::block_index)

inline void __syncthreads() { emulator::wait(emulator::machine.block()); }

inline float __shfl_xor_sync(unsigned, float value, int distance) {
  emulator::Thread* me = emulator::machine.now;
  emulator::Barrier& warp = emulator::machine.warp();
  const unsigned first = emulator::machine.rank() * emulator::machine.of_block;
  memcpy(&me->exchanged, &value, sizeof value);
  emulator::wait(warp);
  memcpy(&value, &emulator::machine.threads[first + (me->index ^ unsigned(distance))]->exchanged, sizeof value);
  emulator::wait(warp);
  return value;
}

inline uint32_t __umulhi(uint32_t a, uint32_t b) { return uint32_t((uint64_t{a} * b) >> 32); }

inline uint4 __ldg(const uint4* from) { return *from; }

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  const std::lock_guard<std::mutex> lock(emulator::running);
  emulator::machine.kernel = [&] { kernel(arguments...); };
  const unsigned cluster = config->numAttrs ? config->attrs->val.clusterDim.x : 1;
  if (config->gridDim.x % cluster) return 1;
  for (unsigned b = 0; b < config->gridDim.x; b += cluster) {
    emulator::run_cluster(b, cluster, config->blockDim.x, config->dynamicSmemBytes);
  }
  return 0;
}
