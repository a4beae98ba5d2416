// What the CUDA kernels offer: one function an op, which queues its work on a stream. No torch here, and no CUDA either.
#pragma once

#include "../core/arguments.h"

struct CUstream_st;

namespace emd::cuda {

using Stream = CUstream_st*;  // a cudaStream_t

// Each throws std::runtime_error where the launch fails. All pointers are to memory of the current device.
void run(const Uniform& op, Stream stream);
void run(const Normal& op, Stream stream);
void run(const Perturb& op, Stream stream);
void run(const LangevinEps& op, Stream stream);
void run(const LangevinZ& op, Stream stream);
void run(const MStepGradient& op, Stream stream);
void run(const ScoreMatchingGradient& op, Stream stream);

// The float32 numbers of scratch memory that a mean over the elements of each sample needs.
int64_t scratch_of(const Shape& shape);
void run(const MStepLoss& op, float* scratch, Stream stream);
void run(const ScoreMatchingLoss& op, float* scratch, Stream stream);

}  // namespace emd::cuda
