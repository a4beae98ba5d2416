// Sums that do not depend on the width of a vector: 64 lanes, added in pairs at the end. They are four of the widest
// vectors, since an addition starts every cycle and takes four. A short row has 16 lanes: adding up 64 would take longer
// than the row.
#pragma once

#include <stdint.h>

#include "../../core/macros.h"

namespace emd::cpu::EMD_ISA {
namespace {

// A loop over a number of elements that the compiler knows is nothing but the arithmetic; one over any number costs as
// much again to enter as a short row.
constexpr int64_t kBlock = 16;

// A value that the compiler knows where it is handed over.
template <auto kValue>
struct Constant {
  EMD_HD constexpr operator decltype(kValue)() const { return kValue; }
};

// Calls function(first, count) for the blocks of n elements; the last may be shorter.
template <class Function>
EMD_HD void for_blocks(int64_t n, Function function) {
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) function(i, Constant<kBlock>());
  if (i < n) function(i, n - i);
}

constexpr int kSumLanes = 64, kShortSum = 256;

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

// lanes[j] becomes the sum of the numbers of lane j so far. The first is added to 0: zeros stored before, or a copy, are
// stored in other widths than they are read, and the read waits for the store.
template <class Number>
EMD_HD void add_to_lane(Number* lanes, int64_t j, int64_t first, Number number) {
  lanes[j] = (first == 0 ? 0 : lanes[j]) + number;
}

// After the first block, where it is not a whole one.
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

// The sum of term(i) for i below n.
template <class Number, class Term>
EMD_HD Number sum(int64_t n, Term term) {
  return n < kShortSum ? short_sum<Number>(n, term) : long_sum<Number>(n, term);
}

}  // namespace
}  // namespace emd::cpu::EMD_ISA
