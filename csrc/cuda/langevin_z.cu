#include "../core/langevin.h"
#include "noise.cuh"

namespace emd::cuda {
namespace {

template <bool kVector>
struct Body {
  LangevinZ op;

  __device__ void operator()(const ElementRange& range) const {
    const RawElements z_words = fetch<kVector>(op.z, range), gradient_words = fetch<kVector>(op.gradient, range);
    const Float8 noise = normals(op.noise, range), gradient = floats<kVector>(gradient_words, op.gradient);
    const float step_size = number_of(op.step_size, range.sample), noise_scale = langevin_noise_scale(step_size, op.exact);
    Float8 z = as_floats(z_words);
#pragma unroll
    for (int i = 0; i < kRun; i++) {
      z.at[i] = langevin_step(z.at[i], gradient.at[i], step_size, noise_scale, noise.at[i]);
    }
    store<kVector>(op.z, range, z);
  }
};

}  // namespace

void run(const LangevinZ& op, Stream stream) {
  const Partition partition = partition_of(op.shape, op.gradient);
  if (vector(op.z, op.shape) && vector(op.gradient, op.shape)) return for_elements(Body<true>{op}, partition, stream);
  for_elements(Body<false>{op}, partition, stream);
}

}  // namespace emd::cuda
