#include "../core/score_matching.h"
#include "means.cuh"

namespace emd::cuda {
namespace {

// The error c_skip x_t + c_out output - x0, for the loss and its gradient.
template <bool kVector, class Op>
__device__ Float8 errors(const Op& op, const ElementRange& range) {
  const RawElements output_words = fetch<kVector>(op.output, range), x0_words = fetch<kVector>(op.x0, range);
  const RawElements x_t_words = fetch<kVector>(op.x_t, range);
  const float c_skip = number_of(op.c_skip, range.sample), c_out = number_of(op.c_out, range.sample);
  const Float8 output = floats<kVector>(output_words, op.output), x0 = floats<kVector>(x0_words, op.x0);
  const Float8 x_t = floats<kVector>(x_t_words, op.x_t);
  Float8 error;
#pragma unroll
  for (int i = 0; i < kRun; i++) error.at[i] = denoising_error(output.at[i], x0.at[i], x_t.at[i], c_skip, c_out);
  return error;
}

template <bool kVector>
struct Term {
  ScoreMatchingLoss op;

  __device__ void squares(const ElementRange& range, Float8& sums) const {
    const Float8 error = errors<kVector>(op, range);
#pragma unroll
    for (int i = 0; i < kRun; i++) sums.at[i] += error.at[i] * error.at[i];
  }
};

template <bool kVector>
struct Gradient {
  ScoreMatchingGradient op;

  __device__ void operator()(const ElementRange& range) const {
    Float8 out = errors<kVector>(op, range);
    const float factor = denoising_gradient_factor(number_of(op.grad, range.sample), number_of(op.weight, range.sample),
                                                   number_of(op.c_out, range.sample), float(op.shape.elements));
#pragma unroll
    for (int i = 0; i < kRun; i++) out.at[i] = product(factor, out.at[i]);
    store<kVector>(op.out, range, out);
  }
};

template <class Op>
bool vectors(const Op& op) {
  return vector(op.output, op.shape) && vector(op.x0, op.shape) && vector(op.x_t, op.shape);
}

template <class Op>
Partition partition_for(const Op& op) {
  return partition_of(op.shape, op.output, op.x0, op.x_t);
}

}  // namespace

void run(const ScoreMatchingLoss& op, float* scratch, Stream stream) {
  if (vectors(op)) return means(Term<true>{op}, partition_for(op), scratch, 1.0f, stream);
  means(Term<false>{op}, partition_for(op), scratch, 1.0f, stream);
}

void run(const ScoreMatchingGradient& op, Stream stream) {
  if (vectors(op) && vector(op.out, op.shape)) return for_elements(Gradient<true>{op}, partition_for(op), stream);
  for_elements(Gradient<false>{op}, partition_for(op), stream);
}

}  // namespace emd::cuda
