// Sums whose result does not depend on the vector width: 64 lanes, added pairwise at the end. 64
// lanes are four of the widest vectors, since an addition starts every cycle and takes four
// cycles. A short row uses 16 lanes, because the reduction of 64 would take longer than the row.
#pragma once

#include <stdint.h>

#include "../../core/macros.h"

namespace emd::cpu::EMD_ISA {
namespace {

// Elements per block. A loop with a constant trip count compiles to the arithmetic only. The setup
// of a loop with a variable trip count costs as much as a short row.
constexpr int64_t kBlock = 16;

// A compile-time constant, passed as a function argument.
template <auto kValue>
struct Constant {
  EMD_HD constexpr operator decltype(kValue)() const { return kValue; }
};

// Calls function(first, count) for the blocks of n elements. The last block may be shorter.
template <class Function>
EMD_HD void for_blocks(int64_t n, Function function) {
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) function(i, Constant<kBlock>());
  if (i < n) function(i, n - i);
}

constexpr int kSumLanes = 64, kShortSum = 256;

// Recursive, so that all widths are constants. A loop over them would store and reload at each
// step.
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

// Adds a number to lane j. The first number is added to a literal 0: zeros stored before the loop
// would have another store width than the load, which stalls store forwarding.
template <class Number>
EMD_HD void add_to_lane(Number* lanes, int64_t j, int64_t first, Number number) {
  lanes[j] = (first == 0 ? 0 : lanes[j]) + number;
}

// Clears the other lanes after a first block that is not full.
template <class Number>
EMD_HD void clear_lanes_from(Number* lanes, int64_t count) {
  for (int64_t j = count; j < kBlock; j++) lanes[j] = 0;
}

template <class Number, class Term>
EMD_HD Number short_sum(int64_t n, Term term) {
  alignas(64) Number lanes[kBlock];
  for_blocks(n, [&](int64_t first, auto count) __attribute__((always_inline)) {
#pragma omp simd
    for (int64_t j = 0; j < count; j++) add_to_lane<Number>(lanes, j, first, term(first + j));
    if (first == 0) clear_lanes_from(lanes, count);
  });
  return n > 0 ? sum_of_lanes<kBlock>(lanes) : 0;
}

template <class Number, class Term>
EMD_HD Number long_sum(int64_t n, Term term) {
  alignas(64) Number lanes[kSumLanes];
#pragma omp simd
  for (int j = 0; j < kSumLanes; j++) lanes[j] = Number(0) + term(j);
  int64_t i = kSumLanes;
  for (; i + kSumLanes <= n; i += kSumLanes) {
#pragma omp simd
    for (int j = 0; j < kSumLanes; j++) lanes[j] += term(i + j);
  }
  for (; i + kBlock <= n; i += kBlock) {
#pragma omp simd
    for (int j = 0; j < kBlock; j++) lanes[j] += term(i + j);
  }
  for (int j = 0; i < n; i++, j++) lanes[j] += term(i);
  return sum_of_lanes<kSumLanes>(lanes);
}

// Sum of term(i) for 0 <= i < n.
template <class Number, class Term>
EMD_HD Number sum(int64_t n, Term term) {
  return n < kShortSum ? short_sum<Number>(n, term) : long_sum<Number>(n, term);
}

}  // namespace
}  // namespace emd::cpu::EMD_ISA
