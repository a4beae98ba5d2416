// Conversion of tensors to kernel arguments. Python validates the arguments of an op. The checks
// here prevent memory corruption only.
#pragma once

#include <ATen/ATen.h>

#include "core/arguments.h"

namespace emd {

inline Type type_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat: return Type::float32;
    case at::kBFloat16: return Type::bfloat16;
    case at::kHalf: return Type::float16;
    default: TORCH_CHECK(false, "expected float32, bfloat16 or float16, got ", dtype);
  }
}

// Memory format of a result of group_norm: that of x if x is dense in it, contiguous otherwise. The
// fake implementation in emd_fast/ops has the same rule.
inline at::MemoryFormat layout_of(const at::Tensor& x) {
  if (x.is_contiguous()) return at::MemoryFormat::Contiguous;
  for (const at::MemoryFormat format : {at::MemoryFormat::ChannelsLast, at::MemoryFormat::ChannelsLast3d}) {
    const int64_t dim = format == at::MemoryFormat::ChannelsLast ? 4 : 5;
    if (x.dim() == dim && x.is_contiguous(format)) return format;
  }
  return at::MemoryFormat::Contiguous;
}

// Whether the channels of x (B, C, ...) are neighbours in memory. With one position both layouts are
// equal.
inline bool has_channels_last(const at::Tensor& x) {
  return layout_of(x) != at::MemoryFormat::Contiguous || x.numel() <= x.size(0) * x.size(1);
}

inline Shape shape_of(at::IntArrayRef size) {
  TORCH_CHECK(!size.empty(), "expected a batch dimension");
  return {size[0], c10::multiply_integers(size.slice(1))};
}

// One call of an op. All its tensors hold samples of one shape and are on one device.
struct Call {
  Shape shape;
  at::Device device;

  Call(at::IntArrayRef size, const at::Tensor& like) : shape(shape_of(size)), device(like.device()) {}
  explicit Call(const at::Tensor& like) : Call(like.sizes(), like) {}

  void check(const at::Tensor& tensor) const {
    TORCH_CHECK(tensor.device() == device, "expected a tensor on ", device, ", got one on ", tensor.device());
  }

  // Replaces `tensor` by a contiguous copy if a Source cannot hold its strides, or if a kernel
  // cannot count its elements in 32 bits. `tensor` must outlive the Source.
  Source source(at::Tensor& tensor) const {
    check(tensor);
    TORCH_CHECK(tensor.dim() > 0 && tensor.size(0) == shape.samples &&
                    tensor.numel() == shape.samples * shape.elements,
                "expected ", shape.samples, " samples of ", shape.elements, " elements, got ", tensor.sizes());
    for (;;) {
      Source out = {};
      out.data = tensor.const_data_ptr();
      out.type = type_of(tensor.scalar_type());
      out.sample_stride = tensor.stride(0);
      bool fits = tensor.is_contiguous() || shape.elements <= UINT32_MAX;
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
      if (out.dims == 0) {  // one element per sample
        out.sizes[0] = out.strides[0] = 1;
        out.dims = 1;
      }
      out.dense = out.dims == 1 && out.strides[0] == 1;
      return out;
    }
  }

  Target target(const at::Tensor& contiguous) const {
    return {contiguous.mutable_data_ptr(), type_of(contiguous.scalar_type())};
  }

  float* state(const at::Tensor& tensor) const {
    check(tensor);
    TORCH_CHECK(tensor.scalar_type() == at::kFloat && tensor.is_contiguous() &&
                    tensor.numel() == shape.samples * shape.elements,
                "expected a contiguous float32 tensor of ", shape.samples * shape.elements, " elements");
    return tensor.mutable_data_ptr<float>();
  }

  PerSample per_sample(const at::Tensor& numbers) const {
    check(numbers);
    TORCH_CHECK(numbers.scalar_type() == at::kFloat && numbers.dim() == 1 && numbers.size(0) == shape.samples,
                "expected (", shape.samples, ",) float32, got ", numbers.sizes(), " ", numbers.scalar_type());
    return {numbers.const_data_ptr<float>(), numbers.stride(0), 0};
  }

  PerSample per_sample(const std::optional<at::Tensor>& numbers, double shared) const {
    return numbers ? per_sample(*numbers) : PerSample{nullptr, 0, float(shared)};
  }

  NoiseSource noise(const at::Tensor& noise, int64_t stream, int64_t substep) const {
    check(noise);
    TORCH_CHECK(noise.scalar_type() == at::kLong && noise.numel() == 4 && noise.is_contiguous(),
                "expected the four int64 numbers of a Noise");
    return {noise.const_data_ptr<int64_t>(), uint32_t(stream), uint32_t(substep)};
  }
};

}  // namespace emd
