#include "../core/perturb.h"
#include "noise.cuh"

namespace emd::cuda {
namespace {

template <bool kVector, bool kDraws>
struct Body {
  Perturb op;

  __device__ void operator()(const ElementRange& range) const {
    const RawElements x0_words = fetch<kVector>(op.x0, range);
    Float8 eps;
    if constexpr (kDraws) {
      eps = normals(op.noise, range);
    } else {
      eps = floats<kVector>(fetch<kVector>(op.eps, range), op.eps);
    }
    const Float8 x0 = floats<kVector>(x0_words, op.x0);
    const float alpha = number_of(op.alpha, range.sample), sigma = number_of(op.sigma, range.sample);
    Float8 out;
#pragma unroll
    for (int i = 0; i < kRun; i++) out.at[i] = emd::perturb(x0.at[i], eps.at[i], alpha, sigma);
    store<kVector>(op.out, range, out);
  }
};

template <bool kDraws>
void run_with(const Perturb& op, const Partition& partition, bool vectors, Stream stream) {
  if (vectors) return for_elements(Body<true, kDraws>{op}, partition, stream);
  for_elements(Body<false, kDraws>{op}, partition, stream);
}

}  // namespace

void run(const Perturb& op, Stream stream) {
  const bool vectors = vector(op.x0, op.shape) && vector(op.out, op.shape);
  if (op.draws) return run_with<true>(op, partition_of(op.shape, op.x0), vectors, stream);
  run_with<false>(op, partition_of(op.shape, op.x0, op.eps), vectors && vector(op.eps, op.shape), stream);
}

}  // namespace emd::cuda
