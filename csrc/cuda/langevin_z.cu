#include "../core/langevin.h"
#include "noise.cuh"

namespace emd::cuda {
namespace {

template <bool kVector>
struct Body {
  LangevinZ op;

  __device__ void operator()(const Share& share) const {
    const Fetched z_words = fetch<kVector>(op.z, share), gradient_words = fetch<kVector>(op.gradient, share);
    const Run noise = normals(op.noise, share), gradient = floats<kVector>(gradient_words, op.gradient);
    const float gamma = number_of(op.step_size, share.sample), kick = langevin_kick(gamma);
    Run z = as_floats(z_words);
#pragma unroll
    for (int i = 0; i < kRun; i++) z.at[i] = langevin_step(z.at[i], gradient.at[i], gamma, kick, noise.at[i]);
    store<kVector>(op.z, share, z);
  }
};

}  // namespace

void run(const LangevinZ& op, Stream stream) {
  const Deal deal = deal_of(op.shape, op.gradient);
  if (vector(op.z, op.shape) && vector(op.gradient, op.shape)) return for_elements(Body<true>{op}, deal, stream);
  for_elements(Body<false>{op}, deal, stream);
}

}  // namespace emd::cuda
