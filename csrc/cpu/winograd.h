#pragma once

#include <ATen/ATen.h>

namespace emd::cpu {

// Whether these loops take a convolution of x (B, C, H, W), and are the faster for it: float32, channels_last or a slice
// of that, 3x3 with stride 1, padding 1 and no dilation, channels in and out a multiple of 8, images of at least
// two pixels in height and width, not many more weights than pixels.
bool winograd_serves(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                     at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups);

// One that they take: (B, K, H, W), channels_last. No autograd.
at::Tensor winograd(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias);

}  // namespace emd::cpu
