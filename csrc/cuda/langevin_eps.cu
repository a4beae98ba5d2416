#include "../core/langevin.h"
#include "noise.cuh"

namespace emd::cuda {
namespace {

__device__ inline void add_term(Float8& delta, const Float8& term, float coef, bool first) {
#pragma unroll
  for (int i = 0; i < kRun; i++) {
    const float rounded = product(coef, term.at[i]);
    delta.at[i] = first ? rounded : delta.at[i] + rounded;
  }
}

// kTerms is the number of terms if all tensors are loaded as vectors, all at once. It is 0 if they
// are loaded one after another.
template <int kTerms>
struct Body {
  static constexpr bool kVector = kTerms > 0;
  LangevinEps op;

  __device__ Float8 delta_of(const ElementRange& range, const RawElements* terms) const {
    Float8 delta = {};
    if constexpr (kVector) {
#pragma unroll
      for (int t = 0; t < kTerms; t++) {
        add_term(delta, floats<true>(terms[t], op.term[t]), number_of(op.coef[t], range.sample), t == 0);
      }
    } else {
      for (int t = 0; t < op.terms; t++) {
        const Float8 term = floats<false>(fetch<false>(op.term[t], range), op.term[t]);
        add_term(delta, term, number_of(op.coef[t], range.sample), t == 0);
      }
    }
    return delta;
  }

  __device__ void operator()(const ElementRange& range) const {
    RawElements terms[kVector ? kTerms : 1];
    if constexpr (kVector) {
#pragma unroll
      for (int t = 0; t < kTerms; t++) terms[t] = fetch<true>(op.term[t], range);
    }
    const RawElements eps_words = fetch<kVector>(op.eps, range), drift_words = fetch<kVector>(op.drift, range);
    const Float8 noise = normals(op.noise, range), delta = delta_of(range, terms);
    const float alpha = number_of(op.alpha, range.sample), sigma = number_of(op.sigma, range.sample);
    const float step_size = number_of(op.step_size, range.sample), noise_scale = langevin_noise_scale(step_size, op.exact);
    Float8 eps = as_floats(eps_words), drift = as_floats(drift_words), cotangent;
#pragma unroll
    for (int i = 0; i < kRun; i++) {
      const float gradient = product(sigma, delta.at[i]);
      drift.at[i] = langevin_drift(drift.at[i], gradient, step_size);
      eps.at[i] = langevin_step(eps.at[i], gradient, step_size, noise_scale, noise.at[i]);
      cotangent.at[i] = product(alpha, delta.at[i]);
    }
    store<kVector>(op.drift, range, drift);
    store<kVector>(op.eps, range, eps);
    store<kVector>(op.out, range, cotangent);
  }
};

bool vectors(const LangevinEps& op) {
  bool all = vector(op.eps, op.shape) && vector(op.drift, op.shape) && vector(op.out, op.shape);
  for (int t = 0; t < op.terms; t++) all = all && vector(op.term[t], op.shape);
  return all;
}

// Numbers runs down the rows first if one of the terms has this memory order.
Partition partition_of_terms(const LangevinEps& op) {
  for (int t = 0; t < op.terms; t++) {
    const Partition partition = partition_of(op.shape, op.term[t]);
    if (partition.rows > 1) return partition;
  }
  return partition_of(op.shape);
}

}  // namespace

void run(const LangevinEps& op, Stream stream) {
  static_assert(kMaxTerms == 5);
  const Partition partition = partition_of_terms(op);
  switch (vectors(op) ? op.terms : 0) {
    case 1: return for_elements(Body<1>{op}, partition, stream);
    case 2: return for_elements(Body<2>{op}, partition, stream);
    case 3: return for_elements(Body<3>{op}, partition, stream);
    case 4: return for_elements(Body<4>{op}, partition, stream);
    case 5: return for_elements(Body<5>{op}, partition, stream);
    default: return for_elements(Body<0>{op}, partition, stream);
  }
}

}  // namespace emd::cuda
