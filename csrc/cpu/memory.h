#pragma once

#include <ATen/ATen.h>

namespace emd::cpu {

// A tensor that was just made and not written yet, its memory in huge pages where that is large enough to pay.
at::Tensor with_huge_pages(at::Tensor tensor);

}  // namespace emd::cpu
