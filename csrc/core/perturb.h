// The forward process: x_t = alpha x_0 + sigma eps.
#pragma once

#include "arithmetic.h"
#include "macros.h"

namespace emd {

EMD_HD float perturb(float x0, float eps, float alpha, float sigma) { return product(alpha, x0) + product(sigma, eps); }

}  // namespace emd
