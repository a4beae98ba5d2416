// Interface of the CUDA kernels: one function per op, which queues its work on a stream. It
// includes neither torch nor CUDA headers.
#pragma once

#include "../core/arguments.h"

struct CUstream_st;

namespace emd::cuda {

using Stream = CUstream_st*;  // a cudaStream_t

// Each throws LaunchError (a std::exception) if the launch fails. All pointers are to memory of
// the current device.
void run(const Uniform& op, Stream stream);
void run(const Normal& op, Stream stream);
void run(const Perturb& op, Stream stream);
void run(const LangevinEps& op, Stream stream);
void run(const LangevinZ& op, Stream stream);
void run(const MStepGradient& op, Stream stream);
void run(const ScoreMatchingGradient& op, Stream stream);

// Number of float32 elements of scratch memory for a mean over the elements of each sample.
int64_t scratch_of(const Shape& shape);
void run(const MStepLoss& op, float* scratch, Stream stream);
void run(const ScoreMatchingLoss& op, float* scratch, Stream stream);

}  // namespace emd::cuda
