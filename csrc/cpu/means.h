// Per-sample means from the partial sums of tiles, added in the order of the tiles.
#pragma once

#include "tensors.h"

namespace emd::cpu {

// weight * factor * sum / elements; not a number for samples without elements, as the mean of nothing is in torch.
inline at::Tensor weighted_means(const std::vector<double>& partial, const Shape& shape, const PerSample& weight,
                                 double factor) {
  const at::Tensor out = at::empty({shape.samples}, at::kFloat);
  float* means = out.mutable_data_ptr<float>();
  const int64_t parts = shape.tiles_per_sample();
  for (int64_t s = 0; s < shape.samples; s++) {
    double sum = 0;
    for (int64_t p = 0; p < parts; p++) sum += partial[s * parts + p];
    means[s] = float(double(weight.data[s * weight.stride]) * factor * (sum / double(shape.elements)));
  }
  return out;
}

}  // namespace emd::cpu
