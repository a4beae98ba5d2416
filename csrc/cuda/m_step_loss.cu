#include "../core/m_step.h"
#include "means.cuh"

namespace emd::cuda {
namespace {

template <bool kVector>
struct Term {
  MStepLoss op;

  __device__ void squares(const ElementRange& range, Float8& sums) const {
    const Float8 drift = as_floats(fetch<kVector>(op.drift, range));
#pragma unroll
    for (int i = 0; i < kRun; i++) sums.at[i] += drift.at[i] * drift.at[i];
  }
};

template <bool kVector>
struct Gradient {
  MStepGradient op;

  __device__ void operator()(const ElementRange& range) const {
    const RawElements words = fetch<kVector>(op.drift, range);
    const float factor = m_step_gradient_factor(number_of(op.grad, range.sample), number_of(op.weight, range.sample),
                                                number_of(op.alpha, range.sample), number_of(op.sigma, range.sample),
                                                float(op.shape.elements));
    Float8 out = as_floats(words);
#pragma unroll
    for (int i = 0; i < kRun; i++) out.at[i] = product(factor, out.at[i]);
    store<kVector>(op.out, range, out);
  }
};

}  // namespace

void run(const MStepLoss& op, float* scratch, Stream stream) {
  const Partition partition = partition_of(op.shape);
  if (vector(op.drift, op.shape)) return means(Term<true>{op}, partition, scratch, 0.5f, stream);
  means(Term<false>{op}, partition, scratch, 0.5f, stream);
}

void run(const MStepGradient& op, Stream stream) {
  const Partition partition = partition_of(op.shape);
  const bool vectors = vector(op.drift, op.shape) && vector(op.out, op.shape);
  if (vectors) return for_elements(Gradient<true>{op}, partition, stream);
  for_elements(Gradient<false>{op}, partition, stream);
}

}  // namespace emd::cuda
