#pragma once

#include <ATen/ATen.h>

namespace emd::cpu {

// A tensor that was just made and not written yet, its memory in huge pages where that is large enough to pay.
at::Tensor fresh(at::Tensor tensor);

}  // namespace emd::cpu
