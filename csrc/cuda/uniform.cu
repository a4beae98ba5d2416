#include "noise.cuh"

namespace emd::cuda {
namespace {

template <bool kVector>
struct Body {
  Uniform op;

  __device__ void operator()(const ElementRange& range) const {
    store<kVector>(op.out, range, uniforms(op.noise, range));
  }
};

}  // namespace

void run(const Uniform& op, Stream stream) {
  const Partition partition = partition_of(op.shape);
  if (vector(op.out, op.shape)) return for_elements(Body<true>{op}, partition, stream);
  for_elements(Body<false>{op}, partition, stream);
}

}  // namespace emd::cuda
