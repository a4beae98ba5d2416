#include "../core/m_step.h"
#include "means.cuh"

namespace emd::cuda {
namespace {

template <bool kVector>
struct Term {
  MStepLoss op;

  __device__ void squares(const Share& share, Run& sums) const {
    const Run drift = as_floats(fetch<kVector>(op.drift, share));
#pragma unroll
    for (int i = 0; i < kRun; i++) sums.at[i] += drift.at[i] * drift.at[i];
  }
};

template <bool kVector>
struct Gradient {
  MStepGradient op;

  __device__ void operator()(const Share& share) const {
    const Fetched words = fetch<kVector>(op.drift, share);
    const float factor = m_step_gradient_factor(number_of(op.grad, share.sample), number_of(op.weight, share.sample),
                                                number_of(op.alpha, share.sample), number_of(op.sigma, share.sample),
                                                float(op.shape.elements));
    Run out = as_floats(words);
#pragma unroll
    for (int i = 0; i < kRun; i++) out.at[i] = product(factor, out.at[i]);
    store<kVector>(op.out, share, out);
  }
};

}  // namespace

void run(const MStepLoss& op, float* scratch, Stream stream) {
  const Deal deal = deal_of(op.shape);
  if (vector(op.drift, op.shape)) return means(Term<true>{op}, deal, scratch, 0.5f, stream);
  means(Term<false>{op}, deal, scratch, 0.5f, stream);
}

void run(const MStepGradient& op, Stream stream) {
  const Deal deal = deal_of(op.shape);
  const bool vectors = vector(op.drift, op.shape) && vector(op.out, op.shape);
  if (vectors) return for_elements(Gradient<true>{op}, deal, stream);
  for_elements(Gradient<false>{op}, deal, stream);
}

}  // namespace emd::cuda
