#include "noise.cuh"

namespace emd::cuda {
namespace {

template <bool kVector>
struct Body {
  Normal op;

  __device__ void operator()(const Share& share) const { store<kVector>(op.out, share, normals(op.noise, share)); }
};

}  // namespace

void run(const Normal& op, Stream stream) {
  const Deal deal = deal_of(op.shape);
  if (vector(op.out, op.shape)) return for_elements(Body<true>{op}, deal, stream);
  for_elements(Body<false>{op}, deal, stream);
}

}  // namespace emd::cuda
