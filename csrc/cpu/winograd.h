#pragma once

#include <ATen/ATen.h>

namespace emd::cpu {

// Whether these loops support a convolution of x (B, C, H, W) and are faster for it. They support
// float32, channels_last or a slice of that, 3x3 with stride 1, padding 1 and no dilation, input
// and output channels that are multiples of 8, and images of at least two by two pixels. They are
// faster unless there are many more weights than pixels.
bool winograd_serves(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                     at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups);

// A supported convolution. Returns (B, K, H, W), channels_last. It has no autograd.
at::Tensor winograd(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias);

}  // namespace emd::cpu
