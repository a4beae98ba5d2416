// The gradient of the M-step's regression, w / 2 mean(drift^2) in value, with respect to the generator's output.
#pragma once

#include "arithmetic.h"
#include "macros.h"

namespace emd {

// What multiplies drift: -w (alpha / sigma) grad / n.
EMD_HD float m_step_gradient_factor(float grad, float weight, float alpha, float sigma, float elements) {
  return -product(product(grad, weight), alpha / sigma) / elements;
}

}  // namespace emd
