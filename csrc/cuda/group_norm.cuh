// What the kernels of group_norm share: the place of a thread, vectors of eight channels, the
// numbers of a channel, sums over the rows of a block, SiLU by approximate instructions.
#pragma once

#include "../core/group_norm.h"
#include "chip.cuh"
#include "elements.cuh"
#include "group_norm.h"

namespace emd::cuda {

constexpr int kStages = 4;   // of the copies to shared memory
constexpr int kAhead = 4;    // 16-byte loads of a thread that are under way, where nothing is kept

__device__ inline float element_of(const void* data, Type type, int64_t at) {
  switch (type) {
    case Type::float32: return static_cast<const float*>(data)[at];
    case Type::bfloat16: return to_float(static_cast<const Bfloat16*>(data)[at]);
    default: return to_float(static_cast<const Float16*>(data)[at]);
  }
}

__device__ inline float number_of(const PerChannel& numbers, int64_t sample, uint32_t channel, float absent) {
  if (!numbers.data) return absent;
  return element_of(numbers.data, numbers.type, sample * numbers.sample_stride + channel * numbers.channel_stride);
}

// A tensor whose type is known at run time. Its elements are read and written one by one.
struct AnyType {};

template <class T>
constexpr int kBytes = sizeof(T);
template <>
inline constexpr int kBytes<AnyType> = 0;
// For two-byte types the center is part of the offset: y = x gain + offset, which spares a
// subtraction. What cancels there is below the rounding of x itself. float32 subtracts first.
template <class T>
constexpr bool kFolded = kBytes<T> == 2;

// Blocks for a multiprocessor that the compiler plans registers for: 80 a thread, or 168. Without it
// ptxas spills to fit one more block.
template <class T>
constexpr int kBlocks = kFolded<T> ? 2 : 1;

// Eight channels as they lie in memory.
template <class T>
struct Vector {
  uint4 words[sizeof(T) / 2];
};
template <>
struct Vector<AnyType> {
  Float8 numbers;
};

template <class T>
__device__ Float8 floats(const Vector<T>& vector) {
  if constexpr (sizeof(T) == 4) {
    return as_floats({vector.words[0], vector.words[1]});
  } else {
    return unpacked<T>(vector.words[0]);
  }
}
template <>
__device__ inline Float8 floats(const Vector<AnyType>& vector) {
  return vector.numbers;
}

template <class T>
__device__ uint32_t rounded_pair(float low, float high) {
#if defined(__CUDA_ARCH__)
  if constexpr (kFolded<T>) {  // one instruction for both
    if constexpr (__is_same(T, Bfloat16)) {
      const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
      return *reinterpret_cast<const uint32_t*>(&both);
    } else {
      const __half2 both = __floats2half2_rn(low, high);
      return *reinterpret_cast<const uint32_t*>(&both);
    }
  }
#endif
  return pair<T>(low, high);
}

// Where a block of threads and a thread are.
struct NormPlace {
  int64_t sample;
  uint32_t part, channel;     // the first channel of the block
  uint32_t vector, row;       // of the thread
  uint32_t first, length;     // positions of the part
  uint32_t even, longer;      // positions of a row; so many rows, the first ones, have one more
  uint32_t count;             // positions of the thread; 0 for an idle thread
  int64_t start, step;        // element of the thread's first channels, and from one position to the next
  uint32_t channels;          // 8, or fewer in the last run of a tensor without vectors

  __device__ NormPlace(const GroupNorm& op, const NormTile& tile) {
    const uint32_t rest = blockIdx.x / tile.parts, of_sample = rest / tile.blocks;
    part = blockIdx.x - rest * tile.parts;
    sample = of_sample;
    channel = (rest - of_sample * tile.blocks) * tile.block;
    row = threadIdx.x / tile.vectors;
    vector = threadIdx.x - row * tile.vectors;
    first = part * tile.span;
    length = tile.span < op.positions - first ? tile.span : op.positions - first;
    even = length / tile.rows;
    longer = length - even * tile.rows;
    const uint32_t own = channel + vector * kNormRun;
    channels = own >= op.channels ? 0 : op.channels - own < kNormRun ? op.channels - own : kNormRun;
    count = row < tile.rows && channels ? count_of_row(row) : 0;
    start = (sample * op.positions + first + row) * op.channels + own;
    step = int64_t(tile.rows) * op.channels;
  }

  // Positions of a row below tile.rows.
  __device__ uint32_t count_of_row(uint32_t row) const { return even + (row < longer); }
};


template <class T>
__device__ Vector<T> load(const void* data, int64_t at) {
  Vector<T> vector;
  const uint4* from = reinterpret_cast<const uint4*>(static_cast<const T*>(data) + at);
  vector.words[0] = __ldg(from);
  if constexpr (sizeof(T) == 4) vector.words[1] = __ldg(from + 1);
  return vector;
}

template <class T>
__device__ Vector<T> load(const GroupNorm& op, const void* data, int64_t at, uint32_t channels) {
  if constexpr (kBytes<T> > 0) {
    return load<T>(data, at);
  } else {
    Vector<T> vector = {};
#pragma unroll
    for (int i = 0; i < kRun; i++) {
      if (i < int(channels)) vector.numbers.at[i] = element_of(data, op.type, at + i);
    }
    return vector;
  }
}

template <class T>
__device__ void store(const GroupNorm& op, void* data, int64_t at, const Float8& run, uint32_t channels) {
  if constexpr (kBytes<T> == 4) {
    RawElements numbers;
    set(numbers, run);
    float* to = static_cast<float*>(data) + at;
    store_16(to, numbers.low);
    store_16(to + 4, numbers.high);
  } else if constexpr (kBytes<T> == 2) {
    store_16(static_cast<T*>(data) + at,
             {rounded_pair<T>(run.at[0], run.at[1]), rounded_pair<T>(run.at[2], run.at[3]),
              rounded_pair<T>(run.at[4], run.at[5]), rounded_pair<T>(run.at[6], run.at[7])});
  } else {
    switch (op.type) {
      case Type::float32: return store_each(static_cast<float*>(data) + at, run, int(channels));
      case Type::bfloat16: return store_each(static_cast<Bfloat16*>(data) + at, run, int(channels));
      case Type::float16: return store_each(static_cast<Float16*>(data) + at, run, int(channels));
    }
  }
}

// body(position index, vectors) for each position of the thread, with kAhead vectors loaded before
// they are used.
template <class T, int kTensors, class Body>
__device__ void walk(const GroupNorm& op, const NormPlace& place, const void* const (&from)[kTensors], Body body) {
  constexpr int kSteps = kAhead / kTensors;
  int64_t at = place.start;
  uint32_t left = place.count;
#pragma unroll 1
  for (; left >= kSteps; left -= kSteps) {
    Vector<T> ahead[kSteps][kTensors];
#pragma unroll
    for (int s = 0; s < kSteps; s++) {
#pragma unroll
      for (int t = 0; t < kTensors; t++) ahead[s][t] = load<T>(op, from[t], at + s * place.step, place.channels);
    }
#pragma unroll
    for (int s = 0; s < kSteps; s++) body(at + s * place.step, ahead[s]);
    at += kSteps * place.step;
  }
#pragma unroll 1
  for (; left > 0; left--) {
    Vector<T> one[kTensors];
#pragma unroll
    for (int t = 0; t < kTensors; t++) one[t] = load<T>(op, from[t], at, place.channels);
    body(at, one);
    at += place.step;
  }
}

// The part of a tensor that a block keeps in shared memory. A thread reads only what it has copied.
template <class T>
struct Kept {
  char* own;       // of this thread
  uint32_t halves, step;  // bytes from one 16-byte word of a vector to the next, and from step to step

  __device__ Kept(char* shared, const NormTile& tile) {
    halves = tile.rows * tile.vectors * 16;
    step = halves * (sizeof(T) / 2);
    own = shared + threadIdx.x * 16;
  }

  __device__ void copy(const void* data, int64_t at, uint32_t s) const {
    const T* from = static_cast<const T*>(data) + at;
    copy_16(own + s * step, from);
    if constexpr (sizeof(T) == 4) copy_16(own + s * step + halves, from + 4);
  }

  __device__ Vector<T> read(uint32_t s) const {
    Vector<T> vector;
    vector.words[0] = *reinterpret_cast<const uint4*>(own + s * step);
    if constexpr (sizeof(T) == 4) vector.words[1] = *reinterpret_cast<const uint4*>(own + s * step + halves);
    return vector;
  }
};

template <class T>
__device__ uint32_t kept_bytes(const NormTile& tile) {
  return tile.steps() * tile.rows * tile.vectors * kNormRun * kBytes<T>;
}

// Starts the copies of all positions of the thread, in kStages stages.
template <class T, int kTensors>
__device__ void copy_all(const NormPlace& place, const NormTile& tile, const Kept<T> (&kept)[kTensors],
                         const void* const (&from)[kTensors]) {
  const uint32_t of_stage = (tile.steps() + kStages - 1) / kStages;
  int64_t at = place.start;
  uint32_t s = 0;
#pragma unroll 1
  for (int stage = 0; stage < kStages; stage++) {
    const uint32_t last = of_stage * (stage + 1) < place.count ? of_stage * (stage + 1) : place.count;
#pragma unroll 4
    for (; s < last; s++) {
#pragma unroll
      for (int t = 0; t < kTensors; t++) kept[t].copy(from[t], at, s);
      at += place.step;
    }
    commit_copies();
  }
}

// body(s) for each step s of the thread, after its copy has arrived.
template <class Body>
__device__ void as_they_arrive(const NormPlace& place, const NormTile& tile, Body body) {
  const uint32_t of_stage = (tile.steps() + kStages - 1) / kStages;
  uint32_t s = 0;
#pragma unroll 1
  for (int stage = 0; stage < kStages; stage++) {
    switch (stage) {
      case 0: wait_for_copies<3>(); break;
      case 1: wait_for_copies<2>(); break;
      case 2: wait_for_copies<1>(); break;
      default: wait_for_copies<0>(); break;
    }
    const uint32_t last = of_stage * (stage + 1) < place.count ? of_stage * (stage + 1) : place.count;
#pragma unroll 2
    for (; s < last; s++) body(s);
  }
}

// What shared memory holds beside the tile.
struct NormShared {
  float2* entries;                 // (kept, block)
  float *slope, *offset, *added;   // (block)
  float2* channels;                // (block)
  float *of_block, *of_sample;     // (groups of the block, 2)

  __device__ NormShared(char* memory, const NormTile& tile, uint32_t groups) {
    entries = reinterpret_cast<float2*>(memory);
    slope = reinterpret_cast<float*>(entries + tile.kept() * tile.block);
    offset = slope + tile.block;
    added = offset + tile.block;
    channels = reinterpret_cast<float2*>(added + tile.block);
    of_block = reinterpret_cast<float*>(channels + tile.block);
    of_sample = of_block + 2 * groups;
  }
};

// The numbers of the block's channels, each by one thread: slope, offset and added. A barrier must
// follow.
__device__ inline void load_channels(const GroupNorm& op, const NormPlace& place, const NormTile& tile,
                                     const NormShared& shared) {
  for (uint32_t c = threadIdx.x; c < tile.block; c += tile.threads()) {
    const uint32_t channel = place.channel + c;
    if (channel >= op.channels) break;
    const float factor = 1.0f + number_of(op.scale, place.sample, channel, 0.0f);
    shared.slope[c] = number_of(op.weight, place.sample, channel, 1.0f) * factor;
    shared.offset[c] = fused(number_of(op.bias, place.sample, channel, 0.0f), factor,
                             number_of(op.shift, place.sample, channel, 0.0f));
    shared.added[c] = number_of(op.add, place.sample, channel, 0.0f);
  }
}

// The group of a thread's channel, counted from group `first` of the tensor.
struct GroupOf {
  uint32_t index, member, width;

  __device__ GroupOf(const NormPlace& place, uint32_t width, uint32_t first) : width(width) {
    const uint32_t channel = computed_anew(place.channel + place.vector * kNormRun), group = channel / width;
    index = group - first;
    member = channel - group * width;
  }

  __device__ void next() {
    if (++member == width) {
      member = 0;
      index++;
    }
  }
};

// A thread with 16-byte vectors has eight channels or none.
template <class T>
__device__ bool has_channel(const NormPlace& place, int i) {
  return kBytes<T> > 0 ? place.channels > 0 : i < int(place.channels);
}

// y = (x - center) gain + offset for the eight channels of a thread; folded, y = x gain + offset.
template <class T>
struct Maps {
  float center[kRun], gain[kRun], offset[kRun];

  // `mean` and `rstd` from the group of channel `place.channel` on, `stride` numbers apart.
  __device__ Maps(const NormPlace& place, const NormShared& shared, const float* mean, const float* rstd, int stride,
                  GroupOf group) {
#pragma unroll
    for (int i = 0; i < kRun; i++) {
      center[i] = gain[i] = offset[i] = 0;
      if (has_channel<T>(place, i)) {
        const uint32_t own = place.vector * kNormRun + i;
        center[i] = mean[group.index * stride] - shared.added[own];
        gain[i] = rstd[group.index * stride] * shared.slope[own];
        offset[i] = shared.offset[own];
        if (kFolded<T>) offset[i] = fused(-center[i], gain[i], offset[i]);
      }
      group.next();
    }
  }

  __device__ float apart(float x, int i) const { return kFolded<T> ? x : x - center[i]; }
  __device__ float value(float apart, int i) const { return fused(apart, gain[i], offset[i]); }
};

// 1 / (1 + exp(-y)) by two approximate instructions. For two-byte types their errors of a few units
// in the last place of float32 are far below the rounding of the result. For float32 the rounding
// error of the exponent and the error of the reciprocal are corrected, in six more instructions.
template <class T>
__device__ float sigmoid(float y) {
  constexpr float kPerUnit = -1.4426950408889634f, kRest = -1.925963033500e-8f;  // -log2(e)
  if constexpr (kFolded<T>) return reciprocal_approx(1.0f + exp2_approx(product(y, kPerUnit)));
  const float bounded = fmaxf(y, -87.0f);  // no infinity, which the correction would make a NaN
  const float exponent = product(bounded, kPerUnit);
  const float rest = fused(bounded, kRest, fused(bounded, kPerUnit, -exponent));
  const float power = exp2_approx(exponent);
  const float sum = 1.0f + fused(power, product(rest, 0.6931471805599453f), power);
  const float inverse = reciprocal_approx(sum);
  return fused(inverse, fused(-sum, inverse, 1.0f), inverse);
}

template <bool kSilu, class T>
__device__ float activated(float y) {
  return kSilu ? product(y, sigmoid<T>(y)) : y;
}

template <bool kSilu, class T>
__device__ float inner_gradient(float grad, float y) {
  if (!kSilu) return grad;
  const float gate = sigmoid<T>(y);
  return product(grad, product(gate, fused(y, 1.0f - gate, 1.0f)));
}

// Adds the pairs of all rows, channel by channel, and leaves them in shared.channels (block).
__device__ inline void sum_rows(const NormPlace& place, const NormTile& tile, const NormShared& shared, float* a,
                                float* b) {
  const uint32_t kept = tile.kept();
  const bool active = place.row < tile.rows, upper = place.row >= kept;
  float2* own = shared.entries + (upper ? place.row - kept : place.row) * tile.block + place.vector * kNormRun;
  if (active && upper) {
#pragma unroll
    for (int i = 0; i < kRun; i++) own[i] = {a[i], b[i]};
  }
  __syncthreads();
  if (active && !upper) {
#pragma unroll
    for (int i = 0; i < kRun; i++) {
      const float2 other = place.row + kept < tile.rows ? own[i] : float2{0, 0};
      own[i] = {a[i] + other.x, b[i] + other.y};
    }
  }
  __syncthreads();
  for (uint32_t c = threadIdx.x; c < tile.block; c += tile.threads()) {
    float2 sum = {0, 0};
    for (uint32_t row = 0; row < kept; row++) {
      const float2 one = shared.entries[row * tile.block + c];
      sum = {sum.x + one.x, sum.y + one.y};
    }
    shared.channels[c] = sum;
  }
  __syncthreads();
}

__device__ inline float warp_sum(float value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}

inline bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

// What the current device has.
inline Chip current_chip() {
  int device = 0, major = 0, of_block = 0, of_multiprocessor = 0;
  check(cudaGetDevice(&device), "no current CUDA device: ");
  const char* what = "a CUDA device did not tell its sizes: ";
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), what);
  check(cudaDeviceGetAttribute(&of_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), what);
  check(cudaDeviceGetAttribute(&of_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device), what);
  return {of_block, of_multiprocessor, major >= 9};
}

inline LaunchShape shape_of_launch(const NormTile& tile) {
  return {int(tile.shared), tile.resident ? int(tile.parts) : 1};
}

template <bool kValue>
struct Flag {
  constexpr operator bool() const { return kValue; }
};

// kernel(element type, whether there is a SiLU), both as types.
template <class Kernel>
void for_kernel(const GroupNorm& op, const NormTile& tile, Kernel kernel) {
  const auto with = [&](auto silu) {
    if (!tile.vector) return kernel(AnyType{}, silu);
    switch (op.type) {
      case Type::float32: return kernel(float{}, silu);
      case Type::bfloat16: return kernel(Bfloat16{}, silu);
      case Type::float16: return kernel(Float16{}, silu);
    }
  };
  if (op.silu) return with(Flag<true>{});
  with(Flag<false>{});
}

}  // namespace emd::cuda
