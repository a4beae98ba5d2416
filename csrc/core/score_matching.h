// Denoising score matching: weight * mean((c_skip x_t + c_out output - x0)^2).
#pragma once

#include "arithmetic.h"
#include "macros.h"

namespace emd {

EMD_HD float denoising_error(float output, float x0, float x_t, float c_skip, float c_out) {
  return (product(c_skip, x_t) + product(c_out, output)) - x0;
}

// The factor of the error in the gradient with respect to the output.
EMD_HD float denoising_gradient_factor(float grad, float weight, float c_out, float elements) {
  return product(2.0f * product(grad, weight), c_out) / elements;
}

}  // namespace emd
