#pragma once

#include <ATen/ATen.h>

namespace emd::cpu {

// Requests huge pages for a new tensor, not written yet, if it is large enough. Returns the
// tensor.
at::Tensor with_huge_pages(at::Tensor tensor);

}  // namespace emd::cpu
