// Element-wise kernels: the elements of each thread, loads and stores, and the launch.
//
// A thread has a run of eight consecutive elements of one sample: 16 bytes of bfloat16, two
// 16-byte accesses of float32, two Philox blocks. If every tensor is contiguous and aligned, the
// kernel with `kVector` issues all loads before it computes. Otherwise the other kernel reads any
// strides. It numbers runs across channels first if a tensor is channels_last, so that
// neighbouring threads read neighbouring channels.
#pragma once

#include "../core/reduced.h"
#include "launch.cuh"

namespace emd::cuda {

constexpr int kRun = 8;
constexpr int kThreads = 128;

// The elements of a thread: `count` (0 to 8) elements of a sample from `element`, a multiple of
// eight.
struct ElementRange {
  int64_t sample, element, flat;  // flat: index of its first element in a contiguous tensor
  int count;
};

// Division of numbers below 2^31, by a multiplication and a shift (Granlund and Montgomery, 1994).
struct Divider {
  uint32_t by, factor, shift;

  explicit Divider(uint32_t by) : by(by), factor(0), shift(0) {
    if (by <= 1) return;
    while ((uint64_t{1} << (shift + 1)) < by) shift++;  // 2^shift < by <= 2^(shift + 1)
    factor = uint32_t(((uint64_t{1} << (32 + shift)) + by - 1) / by);
  }

  __device__ uint32_t quotient(uint32_t n) const { return by <= 1 ? n : __umulhi(n, factor) >> shift; }
};

// Partition of the samples into runs. The runs of a sample are numbered along its rows, or down
// its rows first if rows > 1.
struct Partition {
  Shape shape;
  int64_t runs;  // runs per sample
  uint32_t rows, columns;
  Divider by_runs, by_rows;

  Partition(const Shape& shape, uint32_t rows, uint32_t columns)
      : shape(shape), runs((shape.elements + kRun - 1) / kRun), rows(rows), columns(columns),
        by_runs(uint32_t(runs)), by_rows(rows) {}

  __device__ ElementRange range(int64_t sample, int64_t run) const {
    int64_t element = run * kRun;
    if (rows > 1) {
      const uint32_t column = by_rows.quotient(uint32_t(run)), row = uint32_t(run) - column * rows;
      element = int64_t(row) * columns + column * kRun;
    }
    const int64_t rest = shape.elements - element;
    return {sample, element, sample * shape.elements + element, rest < kRun ? int(rest) : kRun};
  }

  // The elements of a thread of the grid. Past the last run the count is 0.
  __device__ ElementRange of_thread(int64_t thread) const {
    const int64_t total = shape.samples * runs;
    if (thread >= total) return {};
    if (total <= INT32_MAX) {  // a 64-bit division costs as much as the noise
      const uint32_t sample = by_runs.quotient(uint32_t(thread));
      return range(sample, uint32_t(thread) - sample * uint32_t(runs));
    }
    const int64_t sample = thread / runs;
    return range(sample, thread - sample * runs);
  }
};

// Eight elements of a tensor: raw memory contents with kVector, converted to float32 without.
struct RawElements {
  uint4 low, high;
};

struct Float8 {
  float at[kRun];
};

__device__ inline bool aligned(const void* pointer) { return (reinterpret_cast<uintptr_t>(pointer) & 15) == 0; }

__device__ inline void set(RawElements& numbers, const Float8& run) {
  numbers.low = {bits_of(run.at[0]), bits_of(run.at[1]), bits_of(run.at[2]), bits_of(run.at[3])};
  numbers.high = {bits_of(run.at[4]), bits_of(run.at[5]), bits_of(run.at[6]), bits_of(run.at[7])};
}

// Offset of an element. Only a contiguous tensor may have more elements per sample than 32 bits
// count.
__device__ inline int64_t offset_of(const Source& source, int64_t sample, int64_t element) {
  int64_t offset = sample * source.sample_stride;
  if (source.dense) return offset + element;
  uint32_t rest = uint32_t(element);
#pragma unroll 1
  for (int d = source.dims - 1; d > 0; d--) {
    const uint32_t size = uint32_t(source.sizes[d]), next = rest / size;
    offset += int64_t(rest - next * size) * source.strides[d];
    rest = next;
  }
  return offset + int64_t(rest) * source.strides[0];
}

struct Offsets {
  int64_t at[kRun];
};

// Offsets of eight elements. If the row length is a multiple of eight, they are in one row.
__device__ inline Offsets offsets_of(const Source& source, const ElementRange& range) {
  const int inner = source.dims - 1;
  Offsets offsets;
  if (source.dense || source.sizes[inner] % kRun == 0) {
    const int64_t first = offset_of(source, range.sample, range.element), stride = source.strides[inner];
#pragma unroll
    for (int i = 0; i < kRun; i++) offsets.at[i] = first + i * stride;
  } else {
#pragma unroll
    for (int i = 0; i < kRun; i++) offsets.at[i] = offset_of(source, range.sample, range.element + i);
  }
  return offsets;
}

template <class T>
__device__ Float8 gather(const void* data, const Offsets& offsets, int count) {
  Float8 run = {};
#pragma unroll
  for (int i = 0; i < kRun; i++) {
    if (i < count) run.at[i] = to_float(static_cast<const T*>(data)[offsets.at[i]]);
  }
  return run;
}

template <class T>
__device__ Float8 unpacked(uint4 words) {
  const uint32_t word[4] = {words.x, words.y, words.z, words.w};
  Float8 run;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    run.at[2 * i] = to_float(T{uint16_t(word[i])});
    run.at[2 * i + 1] = to_float(T{uint16_t(word[i] >> 16)});
  }
  return run;
}

__device__ inline Float8 as_floats(const RawElements& numbers) {
  return {float_of(numbers.low.x),  float_of(numbers.low.y),  float_of(numbers.low.z),  float_of(numbers.low.w),
          float_of(numbers.high.x), float_of(numbers.high.y), float_of(numbers.high.z), float_of(numbers.high.w)};
}

__device__ inline Float8 converted(const RawElements& numbers, Type type) {
  if (type == Type::bfloat16) return unpacked<Bfloat16>(numbers.low);
  if (type == Type::float16) return unpacked<Float16>(numbers.low);
  return as_floats(numbers);
}

// Issues the loads. The conversion is separate, so that all loads of a thread are in flight
// together.
template <bool kVector>
__device__ RawElements fetch(const Source& source, const ElementRange& range) {
  RawElements numbers = {};
  if constexpr (kVector) {
    const int64_t at = range.sample * source.sample_stride + range.element;
    const char* bytes = static_cast<const char*>(source.data) + at * bytes_of(source.type);
    const uint4* from = reinterpret_cast<const uint4*>(bytes);
    numbers.low = __ldg(from);
    if (source.type == Type::float32) numbers.high = __ldg(from + 1);
  } else {
    const Offsets offsets = offsets_of(source, range);
    switch (source.type) {
      case Type::float32: set(numbers, gather<float>(source.data, offsets, range.count)); break;
      case Type::bfloat16: set(numbers, gather<Bfloat16>(source.data, offsets, range.count)); break;
      case Type::float16: set(numbers, gather<Float16>(source.data, offsets, range.count)); break;
    }
  }
  return numbers;
}

template <bool kVector>
__device__ Float8 floats(const RawElements& numbers, const Source& source) {
  return kVector ? converted(numbers, source.type) : as_floats(numbers);
}

// Loads from a contiguous float32 tensor, which this kernel may also write.
template <bool kVector>
__device__ RawElements fetch(const float* state, const ElementRange& range) {
  const float* from = state + range.flat;
  RawElements numbers = {};
  if (kVector || (range.count == kRun && aligned(from))) {
    numbers.low = reinterpret_cast<const uint4*>(from)[0];
    numbers.high = reinterpret_cast<const uint4*>(from)[1];
  } else {
    Float8 run = {};
#pragma unroll
    for (int i = 0; i < kRun; i++) {
      if (i < range.count) run.at[i] = from[i];
    }
    set(numbers, run);
  }
  return numbers;
}

template <class T>
__device__ uint32_t pair(float first, float second) {
  T low, high;
  from_float(first, low);
  from_float(second, high);
  return uint32_t{low.bits} | uint32_t{high.bits} << 16;
}

template <class T>
__device__ uint4 packed(const Float8& run) {
  return {pair<T>(run.at[0], run.at[1]), pair<T>(run.at[2], run.at[3]), pair<T>(run.at[4], run.at[5]),
          pair<T>(run.at[6], run.at[7])};
}

template <class T>
__device__ void store_each(T* to, const Float8& run, int count) {
#pragma unroll
  for (int i = 0; i < kRun; i++) {
    if (i < count) from_float(run.at[i], to[i]);
  }
}

template <bool kVector>
__device__ void store(float* to, const ElementRange& range, const Float8& run) {
  to += range.flat;
  if (kVector || (range.count == kRun && aligned(to))) {
    RawElements numbers;
    set(numbers, run);
    reinterpret_cast<uint4*>(to)[0] = numbers.low;
    reinterpret_cast<uint4*>(to)[1] = numbers.high;
  } else {
    store_each(to, run, range.count);
  }
}

template <bool kVector, class T>
__device__ void store_reduced(T* to, const ElementRange& range, const Float8& run) {
  to += range.flat;
  if (kVector || (range.count == kRun && aligned(to))) {
    *reinterpret_cast<uint4*>(to) = packed<T>(run);
  } else {
    store_each(to, run, range.count);
  }
}

template <bool kVector>
__device__ void store(const Target& target, const ElementRange& range, const Float8& run) {
  switch (target.type) {
    case Type::float32: store<kVector>(static_cast<float*>(target.data), range, run); break;
    case Type::bfloat16: store_reduced<kVector>(static_cast<Bfloat16*>(target.data), range, run); break;
    case Type::float16: store_reduced<kVector>(static_cast<Float16*>(target.data), range, run); break;
  }
}

// Host function: whether every run of a tensor can be accessed as whole 16-byte words.
inline bool vector(const void* data, int64_t sample_stride, int bytes, const Shape& shape) {
  return shape.elements % kRun == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0 &&
         (shape.samples <= 1 || sample_stride * bytes % 16 == 0);
}
inline bool vector(const Source& source, const Shape& shape) {
  return source.dense && vector(source.data, source.sample_stride, bytes_of(source.type), shape);
}
inline bool vector(const float* state, const Shape& shape) { return vector(state, shape.elements, 4, shape); }
inline bool vector(const Target& target, const Shape& shape) {
  return vector(target.data, shape.elements, bytes_of(target.type), shape);
}

inline Partition partition_of(const Shape& shape) { return Partition(shape, 1, 0); }

// Numbers runs down the rows first if one of the tensors has this memory order, as channels_last
// has.
template <class... Sources>
Partition partition_of(const Shape& shape, const Source& first, const Sources&... others) {
  if (!first.dense && first.dims == 2 && first.strides[0] == 1 && first.sizes[1] % kRun == 0 &&
      shape.elements <= INT32_MAX) {
    return Partition(shape, uint32_t(first.sizes[0]), uint32_t(first.sizes[1]));
  }
  return partition_of(shape, others...);
}

template <class Body>
__global__ void __launch_bounds__(kThreads) elements_kernel(const __grid_constant__ Body body,
                                                            const __grid_constant__ Partition partition) {
  const ElementRange range = partition.of_thread(int64_t(blockIdx.x) * kThreads + threadIdx.x);
  if (range.count > 0) body(range);
}

template <class Body>
void for_elements(const Body& body, const Partition& partition, Stream stream) {
  const int64_t threads = partition.shape.samples * partition.runs;
  launch(elements_kernel<Body>, (threads + kThreads - 1) / kThreads, kThreads, stream, body, partition);
}

}  // namespace emd::cuda
