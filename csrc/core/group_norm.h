// Group normalization with an affine map: with u = x + add,
// y = ((u - mean) rstd weight + bias) (1 + scale) + shift.
#pragma once

#include "arithmetic.h"
#include "macros.h"
#include "silu.h"

namespace emd {

// Affine map of one channel of one sample: y = (x - center) gain + offset. The center is
// subtracted first, since x gain - center gain would cancel where the mean is large compared to
// the deviation.
struct ChannelMap {
  float center, gain, offset;
};

EMD_HD ChannelMap channel_map(float mean, float rstd, float weight, float bias, float add, float scale, float shift) {
  return {mean - add, rstd * weight * (1.0f + scale), bias * (1.0f + scale) + shift};
}

template <bool Silu>
EMD_HD float group_norm(float x, float center, float gain, float offset) {
  const float y = fused(x - center, gain, offset);
  return Silu ? silu(y) : y;
}

// Gradient with respect to the input of the activation.
template <bool Silu>
EMD_HD float group_norm_inner_gradient(float grad, float x, float center, float gain, float offset) {
  return Silu ? grad * silu_derivative(fused(x - center, gain, offset)) : grad;
}

// The gradient of x is inner gain + (x - center) slope + constant.
struct ChannelGradient {
  float slope, constant;
};

EMD_HD float group_norm_gradient(float inner, float x, float center, float gain, float slope, float constant) {
  return fused(inner, gain, fused(x - center, slope, constant));
}

// With k = weight (1 + scale), over the elements of a group: sum_k is the sum of k inner, and
// sum_k_normal the sum of k inner (u - mean) rstd.
EMD_HD ChannelGradient channel_gradient(double sum_k, double sum_k_normal, double rstd, double elements) {
  return {float(-rstd * rstd * sum_k_normal / elements), float(-rstd * sum_k / elements)};
}

}  // namespace emd
