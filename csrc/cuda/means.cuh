// Means over the elements of each sample, reproducible bit for bit in every run and every batch.
// The order of additions depends on the sizes of a sample only.
#pragma once

#include "elements.cuh"

namespace emd::cuda {

constexpr int kMeanThreads = 256;
// Runs per block. A second kernel adds the parts of larger samples.
constexpr int64_t kPartRuns = 2048;
// Up to this many runs, one warp has a sample, and a block has several samples.
constexpr int64_t kSmallRuns = 128;

inline int64_t parts_of(int64_t runs) { return runs > kPartRuns ? (runs + kPartRuns - 1) / kPartRuns : 1; }

__device__ inline float sum_of_warp(float value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}

// Sum over a group of 32 or kMeanThreads threads. The result is in its first thread.
template <int kGroup>
__device__ float sum_of_group(float value) {
  value = sum_of_warp(value);
  if constexpr (kGroup > 32) {
    __shared__ float of_warp[kGroup / 32];
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
    __syncthreads();
    value = threadIdx.x < kGroup / 32 ? of_warp[threadIdx.x] : 0;
    value = sum_of_warp(value);
  }
  return value;
}

template <class Op>
__device__ float mean_of(const Op& op, int64_t sample, float sum, float factor) {
  return number_of(op.weight, sample) * factor * (sum / float(op.shape.elements));
}

// Term has `op` and squares(range, sums), which adds a square to each of eight sums. The launch
// bound of three blocks per multiprocessor permits 80 registers per thread. Without it the
// compiler may spill to fit a fourth block.
template <class Term, int kGroup>
__global__ void __launch_bounds__(kMeanThreads, 3) sums_kernel(const __grid_constant__ Term term,
                                                            const __grid_constant__ Partition partition, uint32_t parts,
                                                            float* scratch, float factor) {
  // If a block has several groups, each group has a whole sample.
  const bool whole = kGroup < kMeanThreads;
  const int64_t sample =
      whole ? int64_t(blockIdx.x) * (kMeanThreads / kGroup) + threadIdx.x / kGroup : blockIdx.x / parts;
  const uint32_t part = whole ? 0 : blockIdx.x % parts;
  const int thread = threadIdx.x % kGroup;
  Float8 sums = {};
  if (sample < partition.shape.samples) {
    const int64_t first = part * kPartRuns, last = part + 1 < parts ? first + kPartRuns : partition.runs;
    for (int64_t run = first + thread; run < last; run += kGroup) term.squares(partition.range(sample, run), sums);
  }
  const float pairs = (sums.at[0] + sums.at[4]) + (sums.at[2] + sums.at[6]);
  const float sum = sum_of_group<kGroup>(pairs + ((sums.at[1] + sums.at[5]) + (sums.at[3] + sums.at[7])));
  if (thread != 0 || sample >= partition.shape.samples) return;
  if (parts > 1) {
    scratch[blockIdx.x] = sum;
  } else {
    term.op.loss[sample] = mean_of(term.op, sample, sum, factor);
  }
}

// Adds the parts of a sample, one warp per sample.
template <class Op>
__global__ void __launch_bounds__(kMeanThreads) parts_kernel(const __grid_constant__ Op op, const float* scratch,
                                                             uint32_t parts, float factor) {
  const int64_t sample = int64_t(blockIdx.x) * (kMeanThreads / 32) + threadIdx.x / 32;
  float sum = 0;
  if (sample < op.shape.samples) {
    for (uint32_t part = threadIdx.x % 32; part < parts; part += 32) sum += scratch[sample * parts + part];
  }
  sum = sum_of_warp(sum);
  if (threadIdx.x % 32 == 0 && sample < op.shape.samples) op.loss[sample] = mean_of(op, sample, sum, factor);
}

// loss = weight * factor * mean of the squares.
template <class Term>
void means(const Term& term, const Partition& partition, float* scratch, float factor, Stream stream) {
  const int64_t samples = partition.shape.samples, parts = parts_of(partition.runs);
  constexpr int64_t kTogether = kMeanThreads / 32;  // samples per block with one warp each
  const int64_t blocks = (samples + kTogether - 1) / kTogether;
  if (partition.runs <= kSmallRuns) {
    return launch(sums_kernel<Term, 32>, blocks, kMeanThreads, stream, term, partition, uint32_t(1), scratch, factor);
  }
  launch(sums_kernel<Term, kMeanThreads>, samples * parts, kMeanThreads, stream, term, partition, uint32_t(parts),
         scratch, factor);
  if (parts > 1) {
    launch(parts_kernel<decltype(term.op)>, blocks, kMeanThreads, stream, term.op,
           static_cast<const float*>(scratch), uint32_t(parts), factor);
  }
}

}  // namespace emd::cuda
