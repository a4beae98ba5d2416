// From tensors to what the compiled loops take. Arguments are validated in Python; here only what would corrupt memory.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include "kernels.h"

namespace emd::cpu {

inline Type type_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat: return Type::float32;
    case at::kBFloat16: return Type::bfloat16;
    case at::kHalf: return Type::float16;
    default: TORCH_CHECK(false, "expected float32, bfloat16 or float16, got ", dtype);
  }
}

inline Shape shape_of(at::IntArrayRef size) {
  TORCH_CHECK(!size.empty(), "expected a batch dimension");
  return {size[0], c10::multiply_integers(size.slice(1))};
}

// `tensor` is replaced by a copy where its strides are more than a Source holds; it has to outlive the Source.
inline Source source(at::Tensor& tensor, const Shape& shape) {
  TORCH_CHECK(tensor.is_cpu() && tensor.dim() > 0, "expected a CPU tensor with a batch dimension");
  TORCH_CHECK(tensor.size(0) == shape.samples && tensor.numel() == shape.samples * shape.elements,
              "expected ", shape.samples, " samples of ", shape.elements, " elements, got ", tensor.sizes());
  for (;;) {
    Source out = {};
    out.data = tensor.const_data_ptr();
    out.type = type_of(tensor.scalar_type());
    out.sample_stride = tensor.stride(0);
    bool fits = true;
    for (int64_t d = 1; d < tensor.dim(); d++) {
      const int64_t size = tensor.size(d), stride = tensor.stride(d);
      if (size == 1) continue;
      const int last = out.dims - 1;
      if (last >= 0 && out.strides[last] == size * stride) {
        out.sizes[last] *= size;
        out.strides[last] = stride;
      } else if (out.dims < kMaxDims) {
        out.sizes[out.dims] = size;
        out.strides[out.dims++] = stride;
      } else {
        fits = false;
      }
    }
    if (!fits) {
      tensor = tensor.contiguous();
      continue;
    }
    if (out.dims == 0) {  // one element to a sample
      out.sizes[0] = out.strides[0] = 1;
      out.dims = 1;
    }
    out.dense = out.dims == 1 && out.strides[0] == 1;
    return out;
  }
}

inline Target target(const at::Tensor& contiguous) {
  return {contiguous.mutable_data_ptr(), type_of(contiguous.scalar_type())};
}

inline float* state(const at::Tensor& tensor, const Shape& shape) {
  TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == at::kFloat && tensor.is_contiguous() &&
                  tensor.numel() == shape.samples * shape.elements,
              "expected a contiguous float32 CPU tensor of ", shape.samples * shape.elements, " elements");
  return tensor.mutable_data_ptr<float>();
}

inline PerSample per_sample(const at::Tensor& numbers, const Shape& shape) {
  TORCH_CHECK(numbers.is_cpu() && numbers.scalar_type() == at::kFloat && numbers.dim() == 1 &&
                  numbers.size(0) == shape.samples,
              "expected (", shape.samples, ",) float32, got ", numbers.sizes(), " ", numbers.scalar_type());
  return {numbers.const_data_ptr<float>(), numbers.stride(0)};
}

inline NoiseKey noise_key(const at::Tensor& noise, int64_t stream, int64_t substep) {
  TORCH_CHECK(noise.is_cpu() && noise.scalar_type() == at::kLong && noise.numel() == 4 && noise.is_contiguous(),
              "expected the four int64 numbers of a Noise on the CPU");
  const int64_t* n = noise.const_data_ptr<int64_t>();  // seed, step, first_sample, substep
  return {uint32_t(n[0]), uint32_t(uint64_t(n[0]) >> 32), uint32_t(n[2]), uint32_t(stream * 65536 + substep + n[3]),
          uint32_t(n[1])};
}

// Tiles per thread below which a thread costs more than it saves (measured: a thread takes about 5 us to wake, a tile
// with noise 0.5 us, one without 0.1 us).
constexpr int64_t kNoisyTiles = 16, kPlainTiles = 64;

template <class Op>
void in_parallel(int64_t items, int64_t grain, void (*kernel)(const Op&, int64_t, int64_t), const Op& op) {
  at::parallel_for(0, items, grain, [&](int64_t first, int64_t last) { kernel(op, first, last); });
}

}  // namespace emd::cpu
