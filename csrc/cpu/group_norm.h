// Declarations that the forward and backward pass of group_norm share.
#pragma once

#include <array>

#include "../tensors.h"
#include "kernels.h"
#include "parallel.h"

namespace emd::cpu {

// Returns y, mean (samples, groups) and rstd (samples, groups).
std::tuple<at::Tensor, at::Tensor, at::Tensor> group_norm(
    const at::Tensor& input, int64_t num_groups, const std::optional<at::Tensor>& weight,
    const std::optional<at::Tensor>& bias, double eps, const std::optional<at::Tensor>& add,
    const std::optional<at::Tensor>& scale, const std::optional<at::Tensor>& shift, bool silu);

// Returns the gradients of input, weight, bias, add, scale and shift. A gradient that is not
// needed is an empty tensor.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> group_norm_backward(
    const at::Tensor& grad, const at::Tensor& input, const at::Tensor& mean, const at::Tensor& rstd, int64_t num_groups,
    const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& add, const std::optional<at::Tensor>& scale,
    const std::optional<at::Tensor>& shift, bool silu, std::array<bool, 6> needs);

// Owns the tensors that `op` points into, converted to the layout and type of the loops.
struct GroupNormInputs {
  GroupNormInputs(const at::Tensor& input, int64_t num_groups, const std::optional<at::Tensor>& weight_C,
                  const std::optional<at::Tensor>& bias_C, const std::optional<at::Tensor>& add_BC,
                  const std::optional<at::Tensor>& scale_BC, const std::optional<at::Tensor>& shift_BC, bool silu);

  at::MemoryFormat layout;
  at::Tensor x, weight, bias, add, scale, shift;  // undefined if not given
  at::Tensor absent;                              // a row of zeros and one of ones, used instead
  GroupNorm op = {};
};

// Minimum number of elements per thread. With fewer, a thread costs more than it saves.
constexpr int64_t kGrainElements = 16384;

int64_t grain_of(int64_t elements_of_an_item);

// The items of a pass: the chunks of all samples, or the samples.
enum class Items { chunks, samples };

template <class Op>
struct Pass {
  void (*kernel)(const Op&, int64_t first, int64_t last);
  Items items;
};

// Largest number of float32 elements of a sample that stay in the cache between two passes: 4 MB
// (measured with 32 MB of cache for two cores). For larger samples the inner gradient is computed
// twice.
constexpr int64_t kCachedElements = int64_t{1} << 20;

// Whether there is at least one sample per thread.
inline bool by_sample(const GroupNorm& norm) { return norm.samples >= at::get_num_threads(); }

// Runs the passes of a channels_last op. With at least one sample per thread, each thread runs all
// passes for one sample after another, so that a pass finds in the cache what the previous one has
// read. It calls prepare(the thread's op, thread, sample) before each sample. Otherwise each pass
// runs over the chunks of all samples.
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
