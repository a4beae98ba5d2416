// Gradient of the M-step loss weight / 2 mean(drift^2) with respect to the generator's output.
#pragma once

#include "arithmetic.h"
#include "macros.h"

namespace emd {

// The factor of drift: -weight (alpha / sigma) grad / elements.
EMD_HD float m_step_gradient_factor(float grad, float weight, float alpha, float sigma, float elements) {
  return -product(product(grad, weight), alpha / sigma) / elements;
}

}  // namespace emd
