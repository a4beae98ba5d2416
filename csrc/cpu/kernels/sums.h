// Sums that do not depend on the width of a vector: 64 lanes, added in pairs at the end. They are four of the widest
// vectors, since an addition starts every cycle and takes four.
#pragma once

#include <stdint.h>

#include "../../core/macros.h"

namespace emd::cpu::EMD_ISA {
namespace {

constexpr int kSumLanes = 64, kSumStep = 16;

template <class Number>
EMD_HD Number sum_of_lanes(Number* lanes) {
  for (int width = kSumLanes / 2; width > 0; width /= 2) {
    for (int j = 0; j < width; j++) lanes[j] += lanes[j + width];
  }
  return lanes[0];
}

// The sum of term(i) for i below n.
template <class Number, class Term>
EMD_HD Number sum(int64_t n, Term term) {
  alignas(64) Number lanes[kSumLanes] = {};
  int64_t i = 0;
  for (; i + kSumLanes <= n; i += kSumLanes) {
#pragma omp simd
    for (int j = 0; j < kSumLanes; j++) lanes[j] += term(i + j);
  }
  for (; i + kSumStep <= n; i += kSumStep) {
#pragma omp simd
    for (int j = 0; j < kSumStep; j++) lanes[j] += term(i + j);
  }
  for (int j = 0; i < n; i++, j++) lanes[j] += term(i);
  return sum_of_lanes(lanes);
}

}  // namespace
}  // namespace emd::cpu::EMD_ISA
