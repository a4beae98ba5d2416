#pragma once

#include <ATen/Parallel.h>

namespace emd::cpu {

template <class Op>
void in_parallel(int64_t items, int64_t grain, void (*kernel)(const Op&, int64_t, int64_t), const Op& op) {
  at::parallel_for(0, items, grain, [&](int64_t first, int64_t last) { kernel(op, first, last); });
}

}  // namespace emd::cpu
