// What the forward and the backward pass of group_norm share.
#pragma once

#include <array>

#include "../tensors.h"
#include "kernels.h"
#include "parallel.h"

namespace emd::cpu {

// y, mean and rstd (samples, groups), by the compiled loops.
std::tuple<at::Tensor, at::Tensor, at::Tensor> group_norm(
    const at::Tensor& input, int64_t num_groups, const std::optional<at::Tensor>& weight,
    const std::optional<at::Tensor>& bias, double eps, const std::optional<at::Tensor>& add,
    const std::optional<at::Tensor>& scale, const std::optional<at::Tensor>& shift, bool silu);

// The gradients of input, weight, bias, add, scale and shift; an empty tensor in place of each that is not needed.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> group_norm_backward(
    const at::Tensor& grad, const at::Tensor& input, const at::Tensor& mean, const at::Tensor& rstd, int64_t num_groups,
    const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& add,
    const std::optional<at::Tensor>& scale, const std::optional<at::Tensor>& shift, bool silu,
    std::array<bool, 6> needs);

// The tensors that `op` points into, in the layout and type of the loops.
struct GroupNormInputs {
  GroupNormInputs(const at::Tensor& input, int64_t num_groups, const std::optional<at::Tensor>& weight_C,
                  const std::optional<at::Tensor>& bias_C, const std::optional<at::Tensor>& add_BC,
                  const std::optional<at::Tensor>& scale_BC, const std::optional<at::Tensor>& shift_BC, bool silu);

  at::MemoryFormat layout;
  at::Tensor x, weight, bias, add, scale, shift;  // undefined where not given
  at::Tensor absent;                              // a row of zeros and one of ones, in their place
  GroupNorm op = {};
};

// Elements per thread below which a thread costs more than it saves.
constexpr int64_t kGrainElements = 16384;

int64_t grain_of(int64_t elements_of_an_item);

// A pass over the chunks of all samples, or over the samples.
enum class Items { chunks, samples };

template <class Op>
struct Pass {
  void (*kernel)(const Op&, int64_t first, int64_t last);
  Items items;
};

// Elements of a sample that find room in the caches between two passes, as float32: 4 MB (measured with 32 MB for two
// cores; from there on, a gradient is computed twice).
constexpr int64_t kCachedElements = int64_t{1} << 20;

// Whether there are samples for every thread.
inline bool by_sample(const GroupNorm& norm) { return norm.samples >= at::get_num_threads(); }

// The passes of a channels_last op. Where there are samples for every thread, one after the other for each sample, so
// that a pass finds in the cache what the one before has read, after prepare(op of the thread, thread, sample);
// otherwise each over all chunks.
template <class Op, class Prepare>
void run_passes(const Op& op, const GroupNorm& norm, const std::vector<Pass<Op>>& all, Prepare prepare) {
  const int64_t chunks = norm.chunks();
  if (by_sample(norm)) {
    at::parallel_for(0, norm.samples, grain_of(norm.channels * norm.positions), [&](int64_t first, int64_t last) {
      Op mine = op;
      for (int64_t s = first; s < last; s++) {
        prepare(mine, at::get_thread_num(), s);
        for (const Pass<Op>& pass : all) {
          if (pass.items == Items::chunks) {
            pass.kernel(mine, s * chunks, (s + 1) * chunks);
          } else {
            pass.kernel(mine, s, s + 1);
          }
        }
      }
    });
    return;
  }
  for (const Pass<Op>& pass : all) {
    if (pass.items == Items::chunks) {
      in_parallel(norm.samples * chunks, grain_of(norm.chunk() * norm.channels), pass.kernel, op);
    } else {
      in_parallel(norm.samples, grain_of(chunks * norm.channels * 4), pass.kernel, op);
    }
  }
}

}  // namespace emd::cpu
