// The Langevin step of the E-step (docs/algorithm.md).
#pragma once

#include <math.h>

#include "arithmetic.h"
#include "macros.h"

namespace emd {

// state + step_size (gradient - state) + noise_scale noise.
EMD_HD float langevin_step(float state, float gradient, float step_size, float noise_scale, float noise) {
  return (state + product(step_size, gradient - state)) + product(noise_scale, noise);
}

// The same step without noise: (1 - step_size) drift + step_size gradient.
EMD_HD float langevin_drift(float drift, float gradient, float step_size) {
  return product(1.0f - step_size, drift) + product(step_size, gradient);
}

// sqrt(2 step_size) by Euler's method. The exact solution of the linear part has
// sqrt(step_size (2 - step_size)), with which the prior is stationary.
EMD_HD float langevin_noise_scale(float step_size, bool exact) {
  return sqrtf(step_size * (exact ? 2.0f - step_size : 2.0f));
}

}  // namespace emd
