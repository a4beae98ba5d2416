#include "../core/score_matching.h"
#include "means.cuh"

namespace emd::cuda {
namespace {

// c_skip x_t + c_out output - x0, for the loss and for its gradient.
template <bool kVector, class Op>
__device__ Run errors(const Op& op, const Share& share) {
  const Fetched output_words = fetch<kVector>(op.output, share), x0_words = fetch<kVector>(op.x0, share);
  const Fetched x_t_words = fetch<kVector>(op.x_t, share);
  const float c_skip = number_of(op.c_skip, share.sample), c_out = number_of(op.c_out, share.sample);
  const Run output = floats<kVector>(output_words, op.output), x0 = floats<kVector>(x0_words, op.x0);
  const Run x_t = floats<kVector>(x_t_words, op.x_t);
  Run error;
#pragma unroll
  for (int i = 0; i < kRun; i++) error.at[i] = denoising_error(output.at[i], x0.at[i], x_t.at[i], c_skip, c_out);
  return error;
}

template <bool kVector>
struct Term {
  ScoreMatchingLoss op;

  __device__ void squares(const Share& share, Run& sums) const {
    const Run error = errors<kVector>(op, share);
#pragma unroll
    for (int i = 0; i < kRun; i++) sums.at[i] += error.at[i] * error.at[i];
  }
};

template <bool kVector>
struct Gradient {
  ScoreMatchingGradient op;

  __device__ void operator()(const Share& share) const {
    Run out = errors<kVector>(op, share);
    const float factor = denoising_gradient_factor(number_of(op.grad, share.sample), number_of(op.weight, share.sample),
                                                   number_of(op.c_out, share.sample), float(op.shape.elements));
#pragma unroll
    for (int i = 0; i < kRun; i++) out.at[i] = product(factor, out.at[i]);
    store<kVector>(op.out, share, out);
  }
};

template <class Op>
bool vectors(const Op& op) {
  return vector(op.output, op.shape) && vector(op.x0, op.shape) && vector(op.x_t, op.shape);
}

template <class Op>
Deal deal_for(const Op& op) {
  return deal_of(op.shape, op.output, op.x0, op.x_t);
}

}  // namespace

void run(const ScoreMatchingLoss& op, float* scratch, Stream stream) {
  if (vectors(op)) return means(Term<true>{op}, deal_for(op), scratch, 1.0f, stream);
  means(Term<false>{op}, deal_for(op), scratch, 1.0f, stream);
}

void run(const ScoreMatchingGradient& op, Stream stream) {
  if (vectors(op) && vector(op.out, op.shape)) return for_elements(Gradient<true>{op}, deal_for(op), stream);
  for_elements(Gradient<false>{op}, deal_for(op), stream);
}

}  // namespace emd::cuda
