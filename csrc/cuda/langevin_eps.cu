#include "../core/langevin.h"
#include "noise.cuh"

namespace emd::cuda {
namespace {

__device__ inline void add_term(Run& delta, const Run& term, float coef, bool first) {
#pragma unroll
  for (int i = 0; i < kRun; i++) {
    const float rounded = product(coef, term.at[i]);
    delta.at[i] = first ? rounded : delta.at[i] + rounded;
  }
}

// kTerms is the number of terms where all tensors are read as vectors, all at once; 0 where they are read in turn.
template <int kTerms>
struct Body {
  static constexpr bool kVector = kTerms > 0;
  LangevinEps op;

  __device__ Run delta_of(const Share& share, const Fetched* terms) const {
    Run delta = {};
    if constexpr (kVector) {
#pragma unroll
      for (int t = 0; t < kTerms; t++) {
        add_term(delta, floats<true>(terms[t], op.term[t]), number_of(op.coef[t], share.sample), t == 0);
      }
    } else {
      for (int t = 0; t < op.terms; t++) {
        const Run term = floats<false>(fetch<false>(op.term[t], share), op.term[t]);
        add_term(delta, term, number_of(op.coef[t], share.sample), t == 0);
      }
    }
    return delta;
  }

  __device__ void operator()(const Share& share) const {
    Fetched terms[kVector ? kTerms : 1];
    if constexpr (kVector) {
#pragma unroll
      for (int t = 0; t < kTerms; t++) terms[t] = fetch<true>(op.term[t], share);
    }
    const Fetched eps_words = fetch<kVector>(op.eps, share), drift_words = fetch<kVector>(op.drift, share);
    const Run noise = normals(op.noise, share), delta = delta_of(share, terms);
    const float alpha = number_of(op.alpha, share.sample), sigma = number_of(op.sigma, share.sample);
    const float gamma = number_of(op.step_size, share.sample), kick = langevin_kick(gamma);
    Run eps = as_floats(eps_words), drift = as_floats(drift_words), cotangent;
#pragma unroll
    for (int i = 0; i < kRun; i++) {
      const float gradient = product(sigma, delta.at[i]);
      drift.at[i] = langevin_drift(drift.at[i], gradient, gamma);
      eps.at[i] = langevin_step(eps.at[i], gradient, gamma, kick, noise.at[i]);
      cotangent.at[i] = product(alpha, delta.at[i]);
    }
    store<kVector>(op.drift, share, drift);
    store<kVector>(op.eps, share, eps);
    store<kVector>(op.out, share, cotangent);
  }
};

bool vectors(const LangevinEps& op) {
  bool all = vector(op.eps, op.shape) && vector(op.drift, op.shape) && vector(op.out, op.shape);
  for (int t = 0; t < op.terms; t++) all = all && vector(op.term[t], op.shape);
  return all;
}

// Down the rows of the first term that lies so.
Deal deal_of_terms(const LangevinEps& op) {
  for (int t = 0; t < op.terms; t++) {
    const Deal deal = deal_of(op.shape, op.term[t]);
    if (deal.rows > 1) return deal;
  }
  return deal_of(op.shape);
}

}  // namespace

void run(const LangevinEps& op, Stream stream) {
  static_assert(kMaxTerms == 5);
  const Deal deal = deal_of_terms(op);
  switch (vectors(op) ? op.terms : 0) {
    case 1: return for_elements(Body<1>{op}, deal, stream);
    case 2: return for_elements(Body<2>{op}, deal, stream);
    case 3: return for_elements(Body<3>{op}, deal, stream);
    case 4: return for_elements(Body<4>{op}, deal, stream);
    case 5: return for_elements(Body<5>{op}, deal, stream);
    default: return for_elements(Body<0>{op}, deal, stream);
  }
}

}  // namespace emd::cuda
