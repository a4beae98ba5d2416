// Backward pass of group_norm in channels_last: the gradient of x, and the sums from which
// group_norm_vectors.cu makes those of the vectors.
//
// Resident: a cluster keeps its part of x and of the gradient in shared memory, exchanges two sums
// for each group, and writes the gradient of x: each tensor is read once. Where they do not fit,
// three kernels: sums of the channels of a part, numbers of the groups, the gradient.
#include "group_norm.cuh"

namespace emd::cuda {
namespace {

// Sums of a thread, for eight channels: of the inner gradient i, and of i apart.
struct GradientSums {
  float inner[kRun], product[kRun];

  __device__ GradientSums() {
#pragma unroll
    for (int i = 0; i < kRun; i++) inner[i] = product[i] = 0;
  }

  template <bool kSilu, class T>
  __device__ void add(const Maps<T>& maps, const Float8& grad, const Float8& x) {
#pragma unroll
    for (int i = 0; i < kRun; i++) {
      const float apart = maps.apart(x.at[i], i);
      const float g = inner_gradient<kSilu, T>(grad.at[i], maps.value(apart, i));
      inner[i] += g;
      product[i] = fused(g, apart, product[i]);
    }
  }

  // Where apart is x itself, the center is subtracted here.
  template <class T>
  __device__ void finish(const Maps<T>& maps) {
#pragma unroll
    for (int i = 0; i < kRun; i++) {
      if (kFolded<T>) product[i] = fused(-maps.center[i], inner[i], product[i]);
    }
  }
};

// Slope and constant of a group, from the sums of k i and of k i (u - mean).
__device__ float2 group_gradient(const GroupNorm& norm, float sum_k, float sum_k_apart, float rstd) {
  const float share = 1.0f / norm.elements();
  return {-rstd * rstd * (rstd * (sum_k_apart * share)), -rstd * (sum_k * share)};
}

// The gradient of x is inner gain + apart along + constant, with two numbers for each channel.
struct GradientMap {
  float along[kRun], constant[kRun];

  // `of_groups` (groups, 2) from group_gradient, from the group of channel `place.channel` on.
  template <class T>
  __device__ GradientMap(const NormPlace& place, const Maps<T>& maps, const float* of_groups, GroupOf group) {
#pragma unroll
    for (int i = 0; i < kRun; i++) {
      along[i] = constant[i] = 0;
      if (has_channel<T>(place, i)) {
        const float2 of_group = reinterpret_cast<const float2*>(of_groups)[group.index];
        along[i] = of_group.x;
        constant[i] = of_group.y;
        if (kFolded<T>) constant[i] = fused(-maps.center[i], along[i], constant[i]);
      }
      group.next();
    }
  }

  template <bool kSilu, class T>
  __device__ Float8 gradient(const Maps<T>& maps, const Float8& grad, const Float8& x) const {
    Float8 run;
#pragma unroll
    for (int i = 0; i < kRun; i++) {
      const float apart = maps.apart(x.at[i], i);
      const float g = inner_gradient<kSilu, T>(grad.at[i], maps.value(apart, i));
      run.at[i] = fused(g, maps.gain[i], fused(apart, along[i], constant[i]));
    }
    return run;
  }
};

// Stores one of the three rows of op.sums, from shared.channels, of the part of a block.
__device__ void store_sums(const GroupNormBackward& op, const NormPlace& place, const NormTile& tile,
                           const NormShared& shared, int row, bool second) {
  const GroupNorm& norm = op.forward;
  float* out = op.sums + ((place.sample * tile.parts + place.part) * 3 + row) * norm.channels + place.channel;
  const float* rstds = norm.rstd + place.sample * norm.groups;
  for (uint32_t c = threadIdx.x; c < tile.block && place.channel + c < norm.channels; c += tile.threads()) {
    const float2 sum = shared.channels[c];
    const float rstd = row == 0 ? 1.0f : rstds[(place.channel + c) / norm.width()];
    out[c] = product(rstd, second ? sum.y : sum.x);
  }
}

// The sums that the gradients of vectors need. `sum_of_x` returns the thread's sums of x - center.
template <class SumOfX>
__device__ void store_all_sums(const GroupNormBackward& op, const NormPlace& place, const NormTile& tile,
                               const NormShared& shared, SumOfX sum_of_x) {
  store_sums(op, place, tile, shared, 0, false);
  store_sums(op, place, tile, shared, 1, true);
  if (!op.sums_x) return;
  __syncthreads();
  Float8 sums = sum_of_x(), none = {};
  sum_rows(place, tile, shared, sums.at, none.at);
  store_sums(op, place, tile, shared, 2, false);
}

template <class T>
__device__ void add_apart(const Maps<T>& maps, const Float8& x, Float8& sums) {
#pragma unroll
  for (int i = 0; i < kRun; i++) sums.at[i] += x.at[i] - maps.center[i];
}

template <class T, bool kSilu>
__global__ void __launch_bounds__(kNormThreads, kBlocks<T>)
    resident_gradient_kernel(const __grid_constant__ GroupNormBackward op, const __grid_constant__ NormTile tile) {
  const GroupNorm& norm = op.forward;
  const NormPlace place(norm, tile);
  char* memory = dynamic_shared();
  const uint32_t width = norm.width(), groups = tile.block / width, first_group = place.channel / width;
  const uint32_t bytes = kept_bytes<T>(tile);
  const Kept<T> kept[2] = {{memory, tile}, {memory + bytes, tile}};
  const void* const from[2] = {norm.x, op.grad};
  copy_all<T>(place, tile, kept, from);
  const NormShared shared(memory + 2 * bytes, tile, groups);
  load_channels(norm, place, tile, shared);
  __syncthreads();
  const int64_t of_sample = place.sample * norm.groups;
  const auto numbers = [&] {
    return Maps<T>(place, shared, norm.mean + of_sample, norm.rstd + of_sample, 1, {place, width, 0});
  };

  GradientSums sums;
  {
    const Maps<T> maps = numbers();
    as_they_arrive(place, tile, [&](uint32_t s) {
      sums.add<kSilu>(maps, floats<T>(kept[1].read(s)), floats<T>(kept[0].read(s)));
    });
  }
  // Computed again and again, so that they take no registers in between.
  sums.finish(numbers());
  sum_rows(place, tile, shared, sums.inner, sums.product);
  for (uint32_t g = threadIdx.x / 32; g < groups; g += tile.threads() / 32) {
    float2 sum = {0, 0};
    for (uint32_t c = g * width + threadIdx.x % 32; c < (g + 1) * width; c += 32) {
      const float2 one = shared.channels[c];
      sum = {fused(shared.slope[c], one.x, sum.x), fused(shared.slope[c], one.y, sum.y)};
    }
    sum = {warp_sum(sum.x), warp_sum(sum.y)};
    if (threadIdx.x % 32 == 0) {
      shared.of_block[2 * g] = sum.x;
      shared.of_block[2 * g + 1] = sum.y;
    }
  }
  if (tile.parts > 1) {
    arrive_at_cluster<true>();
    wait_for_cluster();
  } else {
    __syncthreads();
  }
  for (uint32_t g = threadIdx.x; g < groups; g += tile.threads()) {
    const float* of_part = shared.of_block + 2 * g;
    float2 sum = {of_part[0], of_part[1]};
    for (uint32_t part = 0; tile.parts > 1 && part < tile.parts; part++) {
      const float2 one = {of_block(of_part, part), of_block(of_part + 1, part)};
      sum = part ? float2{sum.x + one.x, sum.y + one.y} : one;
    }
    reinterpret_cast<float2*>(shared.of_sample)[g] =
        group_gradient(norm, sum.x, sum.y, norm.rstd[of_sample + first_group + g]);
  }
  __syncthreads();
  if (tile.parts > 1) arrive_at_cluster<false>();
  const Maps<T> maps = numbers();
  const GradientMap map(place, maps, shared.of_sample, {place, width, first_group});
  int64_t at = place.start;
#pragma unroll 1
  for (uint32_t s = 0; s < place.count; s++) {
    store<T>(norm, op.grad_x, at,
             map.gradient<kSilu>(maps, floats<T>(kept[1].read(s)), floats<T>(kept[0].read(s))), kNormRun);
    at += place.step;
  }
  if (op.sums) {
    store_all_sums(op, place, tile, shared, [&] {
      Float8 of_x = {};
      for (uint32_t s = 0; s < place.count; s++) add_apart(maps, floats<T>(kept[0].read(s)), of_x);
      return of_x;
    });
  }
  if (tile.parts > 1) wait_for_cluster();  // other blocks may still read this one's sums
}

// Sums of the channels of a part, to op.sums (samples, parts, 3, channels).
template <class T, bool kSilu>
__global__ void __launch_bounds__(kNormThreads, 1)
    sums_kernel(const __grid_constant__ GroupNormBackward op, const __grid_constant__ NormTile tile) {
  const GroupNorm& norm = op.forward;
  const NormPlace place(norm, tile);
  const NormShared shared(dynamic_shared(), tile, 0);
  load_channels(norm, place, tile, shared);
  __syncthreads();
  const int64_t of_sample = place.sample * norm.groups;
  const Maps<T> maps(place, shared, norm.mean + of_sample, norm.rstd + of_sample, 1, {place, norm.width(), 0});
  const void* const from[2] = {norm.x, op.grad};
  GradientSums sums;
  walk<T, 2>(norm, place, from, [&](int64_t, const Vector<T>* both) {
    sums.add<kSilu>(maps, floats<T>(both[1]), floats<T>(both[0]));
  });
  sums.finish(maps);
  sum_rows(place, tile, shared, sums.inner, sums.product);
  store_all_sums(op, place, tile, shared, [&] {
    Float8 of_x = {};
    const void* const only_x[1] = {norm.x};
    walk<T, 1>(norm, place, only_x, [&](int64_t, const Vector<T>* x) { add_apart(maps, floats<T>(x[0]), of_x); });
    return of_x;
  });
}

constexpr int kGroupThreads = 128;

// Slopes and constants of the groups (samples, groups, 2), one warp for each.
__global__ void __launch_bounds__(kGroupThreads) group_sums_kernel(const __grid_constant__ GroupNormBackward op,
                                                                   const __grid_constant__ NormTile tile) {
  const GroupNorm& norm = op.forward;
  const int64_t at = int64_t(blockIdx.x) * (kGroupThreads / 32) + threadIdx.x / 32;
  if (at >= norm.samples * norm.groups) return;
  const int64_t sample = at / norm.groups;
  const uint32_t width = norm.width(), first = uint32_t(at - sample * norm.groups) * width;
  const float* in = op.sums + sample * tile.parts * 3 * norm.channels + first;
  float2 sum = {0, 0};
  for (uint32_t i = threadIdx.x % 32; i < tile.parts * width; i += 32) {
    const uint32_t part = i / width, c = i % width;
    const float* one = in + int64_t(part) * 3 * norm.channels + c;
    const float slope = number_of(norm.weight, sample, first + c, 1.0f) *
                        (1.0f + number_of(norm.scale, sample, first + c, 0.0f));
    sum = {fused(slope, one[0], sum.x), fused(slope, one[norm.channels], sum.y)};
  }
  sum = {warp_sum(sum.x), warp_sum(sum.y)};
  if (threadIdx.x % 32 == 0) {
    const float rstd = norm.rstd[at];
    reinterpret_cast<float2*>(op.scratch)[at] = group_gradient(norm, sum.x, sum.y / rstd, rstd);
  }
}

template <class T, bool kSilu>
__global__ void __launch_bounds__(kNormThreads, 1)
    gradient_kernel(const __grid_constant__ GroupNormBackward op, const __grid_constant__ NormTile tile) {
  const GroupNorm& norm = op.forward;
  const NormPlace place(norm, tile);
  const NormShared shared(dynamic_shared(), tile, 0);
  load_channels(norm, place, tile, shared);
  __syncthreads();
  const int64_t of_sample = place.sample * norm.groups;
  const Maps<T> maps(place, shared, norm.mean + of_sample, norm.rstd + of_sample, 1, {place, norm.width(), 0});
  const GradientMap map(place, maps, op.scratch + 2 * of_sample, {place, norm.width(), 0});
  const void* const from[2] = {norm.x, op.grad};
  walk<T, 2>(norm, place, from, [&](int64_t at, const Vector<T>* both) {
    store<T>(norm, op.grad_x, at, map.gradient<kSilu>(maps, floats<T>(both[1]), floats<T>(both[0])), place.channels);
  });
}

template <class T, bool kSilu>
void run_streamed(const GroupNormBackward& op, const NormTile& tile, Stream stream) {
  const GroupNorm& norm = op.forward;
  const int64_t blocks = norm.samples * tile.blocks * tile.parts, groups = norm.samples * norm.groups;
  constexpr int64_t kTogether = kGroupThreads / 32;
  launch(sums_kernel<T, kSilu>, blocks, tile.threads(), shape_of_launch(tile), stream, op, tile);
  if (!op.grad_x) return;
  launch(group_sums_kernel, (groups + kTogether - 1) / kTogether, kGroupThreads, stream, op, tile);
  launch(gradient_kernel<T, kSilu>, blocks, tile.threads(), shape_of_launch(tile), stream, op, tile);
}

}  // namespace

NormTile tile_of(const GroupNormBackward& op) {
  const GroupNorm& norm = op.forward;
  const bool vector = is_aligned(norm.x) && is_aligned(op.grad) && is_aligned(op.grad_x);
  NormTile tile = norm_tile_for(norm.channels, norm.width(), norm.positions, bytes_of(norm.type), 2, vector,
                                current_chip());
  if (!op.grad_x && tile.resident) {  // nothing is read a second time
    tile = norm_tile_for(norm.channels, norm.width(), norm.positions, bytes_of(norm.type), 2, vector, {});
  }
  return tile;
}

void run(const GroupNormBackward& op, const NormTile& tile, Stream stream) {
  for_kernel(op.forward, tile, [&](auto type, auto silu) {
    using T = decltype(type);
    if constexpr (kBytes<T> > 0) {
      if (tile.resident) {
        return launch(resident_gradient_kernel<T, silu>, op.forward.samples * tile.blocks * tile.parts, tile.threads(),
                      shape_of_launch(tile), stream, op, tile);
      }
    }
    run_streamed<T, silu>(op, tile, stream);
  });
}

}  // namespace emd::cuda
