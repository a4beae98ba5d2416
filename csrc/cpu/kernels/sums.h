// Sums that do not depend on the width of a vector: 64 lanes, added in pairs at the end. They are four of the widest
// vectors, since an addition starts every cycle and takes four. A short row has 16 lanes: adding up 64 would take longer
// than the row.
#pragma once

#include <stdint.h>

#include "../../core/macros.h"

namespace emd::cpu::EMD_ISA {
namespace {

constexpr int kSumLanes = 64, kSumStep = 16, kShortSum = 256;

// Widths that the compiler knows: a loop over them goes through memory, and waits for it at every turn.
template <int kLanes, class Number>
EMD_HD Number sum_of_lanes(const Number* lanes) {
  if constexpr (kLanes == 1) {
    return lanes[0];
  } else {
    Number half[kLanes / 2];
#pragma omp simd
    for (int j = 0; j < kLanes / 2; j++) half[j] = lanes[j] + lanes[j + kLanes / 2];
    return sum_of_lanes<kLanes / 2>(half);
  }
}

template <int kLanes, class Number, class Term>
EMD_HD Number sum_in_lanes(int64_t n, Term term) {
  alignas(64) Number lanes[kLanes];
  int64_t i = 0;
  if (n >= kLanes) {
#pragma omp simd
    for (int j = 0; j < kLanes; j++) lanes[j] = term(j);  // and not 0, which is stored in other widths than it is read
    i = kLanes;
  } else {
    for (int j = 0; j < kLanes; j++) lanes[j] = 0;
  }
  for (; i + kLanes <= n; i += kLanes) {
#pragma omp simd
    for (int j = 0; j < kLanes; j++) lanes[j] += term(i + j);
  }
  for (; i + kSumStep <= n; i += kSumStep) {
#pragma omp simd
    for (int j = 0; j < kSumStep; j++) lanes[j] += term(i + j);
  }
  for (int j = 0; i < n; i++, j++) lanes[j] += term(i);
  return sum_of_lanes<kLanes>(lanes);
}

// The sum of term(i) for i below n.
template <class Number, class Term>
EMD_HD Number sum(int64_t n, Term term) {
  return n < kShortSum ? sum_in_lanes<kSumStep, Number>(n, term) : sum_in_lanes<kSumLanes, Number>(n, term);
}

}  // namespace
}  // namespace emd::cpu::EMD_ISA
