// Forward pass of group_norm in channels_last.
//
// Resident: a cluster has a sample, or some groups of it. Its blocks keep all of x in shared memory,
// exchange the moments of the groups once, and write y: one read and one write of the tensor. Where
// x does not fit, three kernels: moments of the channels of a part, moments of the groups, y.
#include "group_norm.cuh"

namespace emd::cuda {
namespace {

// Mean and sum of squared deviations of `count` numbers.
struct Moments {
  float mean, squares, count;
};

// Chan, Golub and LeVeque, 1979.
__device__ Moments merged(const Moments& a, const Moments& b) {
  const float count = a.count + b.count, share = b.count / count;
  const float apart = b.mean - a.mean;
  return {fused(apart, share, a.mean), a.squares + fused(product(apart, apart), product(a.count, share), b.squares),
          count};
}

// Moments of `rows` rows of `width` entries, by a warp: first the mean, then the deviations from it.
template <class Entry>
__device__ Moments merged_by_warp(Entry entry, uint32_t rows, uint32_t width) {
  const uint32_t lane = threadIdx.x % 32, first_row = lane / width, row_step = 32 / width;
  const uint32_t first_member = lane - first_row * width, member_step = 32 - row_step * width;
  const auto for_entries = [&](auto use) {
    uint32_t row = first_row, member = first_member;
    while (row < rows) {
      use(entry(row, member));
      row += row_step;
      member += member_step;
      if (member >= width) {
        member -= width;
        row++;
      }
    }
  };
  const float pivot = entry(0, 0).mean;
  float sum = 0, count = 0, squares = 0;
  for_entries([&](const Moments& one) {
    sum = fused(one.count, one.mean - pivot, sum);
    count += one.count;
  });
  count = warp_sum(count);
  const float mean = pivot + warp_sum(sum) / count;
  for_entries([&](const Moments& one) {
    const float apart = one.mean - mean;
    squares += fused(product(one.count, apart), apart, one.squares);
  });
  return {mean, warp_sum(squares), count};
}

__device__ float rstd_of(const Moments& moments, float eps) {
  return 1.0f / sqrtf(moments.squares / moments.count + eps);
}

// Sums of a thread, for eight channels.
struct ChannelSums {
  float pivot[kRun], sum[kRun], squares[kRun];

  __device__ explicit ChannelSums(const Float8& first) {
#pragma unroll
    for (int i = 0; i < kRun; i++) {
      pivot[i] = first.at[i];
      sum[i] = squares[i] = 0;
    }
  }

  __device__ void add(const Float8& x) {
#pragma unroll
    for (int i = 0; i < kRun; i++) {
      const float apart = x.at[i] - pivot[i];
      sum[i] += apart;
      squares[i] = fused(apart, apart, squares[i]);
    }
  }

  // Mean and squared deviations of channel i, with 1 / count or 0. From distances to one of the
  // numbers, the squares lose at most a factor `count` of their precision.
  __device__ float2 moments(int i, float share) const {
    const float apart = product(sum[i], share);
    return {pivot[i] + apart, fmaxf(fused(-sum[i], apart, squares[i]), 0.0f)};
  }
};

// Leaves the moments of the channels of each pair of rows in shared.entries (kept, block), with
// `added`. The count of an entry is that of moments_of_rows.
__device__ void pair_rows(const ChannelSums& sums, const NormPlace& place, const NormTile& tile,
                          const NormShared& shared) {
  const uint32_t kept = tile.kept(), other = place.row + kept;
  const bool active = place.row < tile.rows, upper = place.row >= kept;
  float2* own = shared.entries + (upper ? place.row - kept : place.row) * tile.block + place.vector * kNormRun;
  const float count = float(place.count), others = other < tile.rows ? float(place.count_of_row(other)) : 0.0f;
  float2 mine[kRun];
  const float share = place.count ? 1.0f / count : 0.0f;
#pragma unroll
  for (int i = 0; i < kRun; i++) mine[i] = sums.moments(i, share);
  if (active && upper) {
#pragma unroll
    for (int i = 0; i < kRun; i++) own[i] = mine[i];
  }
  __syncthreads();
  if (active && !upper) {
    // A row above with positions has one below with as many or one more.
    const float of_others = others > 0 ? others / (count + others) : 0.0f, between = product(count, of_others);
#pragma unroll
    for (int i = 0; i < kRun; i++) {
      if (others > 0) {
        const float2 theirs = own[i];
        const float apart = theirs.x - mine[i].x;
        mine[i] = {fused(apart, of_others, mine[i].x),
                   mine[i].y + fused(product(apart, apart), between, theirs.y)};
      }
      own[i] = {mine[i].x + shared.added[place.vector * kNormRun + i], mine[i].y};
    }
  }
  __syncthreads();
}

__device__ Moments moments_of_rows(const NormPlace& place, const NormTile& tile, const NormShared& shared, uint32_t row,
                                   uint32_t channel) {
  const uint32_t other = row + tile.kept();
  const uint32_t count = place.count_of_row(row) + (other < tile.rows ? place.count_of_row(other) : 0);
  const float2 one = shared.entries[row * tile.block + channel];
  return {one.x, one.y, float(count)};
}

template <class T, bool kSilu>
__device__ Float8 normalized(const Maps<T>& maps, const Vector<T>& vector) {
  Float8 run = floats<T>(vector);
#pragma unroll
  for (int i = 0; i < kRun; i++) run.at[i] = activated<kSilu, T>(maps.value(maps.apart(run.at[i], i), i));
  return run;
}

template <class T, bool kSilu>
__global__ void __launch_bounds__(kNormThreads, kBlocks<T>)
    resident_kernel(const __grid_constant__ GroupNorm op, const __grid_constant__ NormTile tile) {
  const NormPlace place(op, tile);
  char* memory = dynamic_shared();
  const uint32_t width = op.width(), groups = tile.block / width, first_group = place.channel / width;
  const Kept<T> kept[1] = {{memory, tile}};
  const void* const from[1] = {op.x};
  copy_all<T>(place, tile, kept, from);
  const NormShared shared(memory + kept_bytes<T>(tile), tile, groups);
  load_channels(op, place, tile, shared);

  wait_for_copies<kStages - 1>();
  ChannelSums sums(place.count ? floats<T>(kept[0].read(0)) : Float8{});
  as_they_arrive(place, tile, [&](uint32_t s) { sums.add(floats<T>(kept[0].read(s))); });
  __syncthreads();  // shared.added
  pair_rows(sums, place, tile, shared);
  for (uint32_t g = threadIdx.x / 32; g < groups; g += tile.threads() / 32) {
    const Moments found = merged_by_warp(
        [&](uint32_t row, uint32_t c) { return moments_of_rows(place, tile, shared, row, g * width + c); },
        tile.kept(), width);
    if (threadIdx.x % 32 == 0) {
      shared.of_block[2 * g] = found.mean;
      shared.of_block[2 * g + 1] = found.squares;
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
    Moments all = {of_part[0], of_part[1], op.elements()};
    for (uint32_t part = 0; tile.parts > 1 && part < tile.parts; part++) {
      const uint32_t left = op.positions - part * tile.span;
      const float count = float(left < tile.span ? left : tile.span) * float(width);
      const Moments one = {of_block(of_part, part), of_block(of_part + 1, part), count};
      all = part ? merged(all, one) : one;
    }
    const float rstd = rstd_of(all, op.eps);
    shared.of_sample[2 * g] = all.mean;
    shared.of_sample[2 * g + 1] = rstd;
    if (place.part == 0) {
      const int64_t at = place.sample * op.groups + first_group + g;
      op.mean[at] = all.mean;
      op.rstd[at] = rstd;
    }
  }
  __syncthreads();
  if (tile.parts > 1) arrive_at_cluster<false>();
  const Maps<T> maps(place, shared, shared.of_sample, shared.of_sample + 1, 2, {place, width, first_group});
  int64_t at = place.start;
#pragma unroll 2
  for (uint32_t s = 0; s < place.count; s++) {
    store<T>(op, op.y, at, normalized<T, kSilu>(maps, kept[0].read(s)), kNormRun);
    at += place.step;
  }
  if (tile.parts > 1) wait_for_cluster();  // other blocks may still read this one's moments
}

// Moments of the channels of a part, to op.scratch (samples, parts, channels) of pairs.
template <class T>
__global__ void __launch_bounds__(kNormThreads, kBlocks<T>)
    moments_kernel(const __grid_constant__ GroupNorm op, const __grid_constant__ NormTile tile) {
  const NormPlace place(op, tile);
  const NormShared shared(dynamic_shared(), tile, 0);
  const void* const from[1] = {op.x};
  for (uint32_t c = threadIdx.x; c < tile.block; c += tile.threads()) {
    shared.added[c] = place.channel + c < op.channels ? number_of(op.add, place.sample, place.channel + c, 0.0f) : 0;
  }
  ChannelSums sums(place.count ? floats<T>(load<T>(op, op.x, place.start, place.channels)) : Float8{});
  walk<T, 1>(op, place, from, [&](int64_t, const Vector<T>* x) { sums.add(floats<T>(x[0])); });
  __syncthreads();
  pair_rows(sums, place, tile, shared);
  float2* out = reinterpret_cast<float2*>(op.scratch) + (place.sample * tile.parts + place.part) * op.channels;
  for (uint32_t c = threadIdx.x; c < tile.block && place.channel + c < op.channels; c += tile.threads()) {
    Moments all = moments_of_rows(place, tile, shared, 0, c);
    for (uint32_t row = 1; row < tile.kept(); row++) all = merged(all, moments_of_rows(place, tile, shared, row, c));
    out[place.channel + c] = {all.mean, all.squares};
  }
}

constexpr int kGroupThreads = 128;

// One warp for a group of a sample.
__global__ void __launch_bounds__(kGroupThreads) groups_kernel(const __grid_constant__ GroupNorm op,
                                                               const __grid_constant__ NormTile tile) {
  const int64_t at = int64_t(blockIdx.x) * (kGroupThreads / 32) + threadIdx.x / 32;
  if (at >= op.samples * op.groups) return;
  const int64_t sample = at / op.groups;
  const uint32_t width = op.width(), first = uint32_t(at - sample * op.groups) * width;
  const float2* in = reinterpret_cast<const float2*>(op.scratch) + sample * tile.parts * op.channels + first;
  const Moments all = merged_by_warp(
      [&](uint32_t part, uint32_t c) -> Moments {
        const uint32_t left = op.positions - part * tile.span;
        const float2 one = in[int64_t(part) * op.channels + c];
        return {one.x, one.y, float(left < tile.span ? left : tile.span)};
      },
      tile.parts, width);
  if (threadIdx.x % 32 == 0) {
    op.mean[at] = all.mean;
    op.rstd[at] = rstd_of(all, op.eps);
  }
}

template <class T, bool kSilu>
__global__ void __launch_bounds__(kNormThreads, 1)
    apply_kernel(const __grid_constant__ GroupNorm op, const __grid_constant__ NormTile tile) {
  const NormPlace place(op, tile);
  const NormShared shared(dynamic_shared(), tile, 0);
  load_channels(op, place, tile, shared);
  __syncthreads();
  const int64_t groups = place.sample * op.groups;
  const Maps<T> maps(place, shared, op.mean + groups, op.rstd + groups, 1, {place, op.width(), 0});
  const void* const from[1] = {op.x};
  walk<T, 1>(op, place, from, [&](int64_t at, const Vector<T>* x) {
    store<T>(op, op.y, at, normalized<T, kSilu>(maps, x[0]), place.channels);
  });
}

template <class T, bool kSilu>
void run_streamed(const GroupNorm& op, const NormTile& tile, Stream stream) {
  const int64_t blocks = op.samples * tile.blocks * tile.parts, groups = op.samples * op.groups;
  constexpr int64_t kTogether = kGroupThreads / 32;
  launch(moments_kernel<T>, blocks, tile.threads(), shape_of_launch(tile), stream, op, tile);
  launch(groups_kernel, (groups + kTogether - 1) / kTogether, kGroupThreads, stream, op, tile);
  launch(apply_kernel<T, kSilu>, blocks, tile.threads(), shape_of_launch(tile), stream, op, tile);
}

}  // namespace

NormTile tile_of(const GroupNorm& op) {
  const bool vector = is_aligned(op.x) && is_aligned(op.y);
  return norm_tile_for(op.channels, op.width(), op.positions, bytes_of(op.type), 1, vector, current_chip());
}

void run(const GroupNorm& op, const NormTile& tile, Stream stream) {
  for_kernel(op, tile, [&](auto type, auto silu) {
    using T = decltype(type);
    if constexpr (kBytes<T> > 0) {
      if (tile.resident) {
        return launch(resident_kernel<T, silu>, op.samples * tile.blocks * tile.parts, tile.threads(),
                      shape_of_launch(tile), stream, op, tile);
      }
    }
    run_streamed<T, silu>(op, tile, stream);
  });
}

}  // namespace emd::cuda
