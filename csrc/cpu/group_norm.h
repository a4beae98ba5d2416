// What the forward and the backward pass of group_norm share.
#pragma once

#include "../tensors.h"
#include "kernels.h"
#include "parallel.h"

namespace emd::cpu {

// The tensors that `op` points into, in the layout and type of the loops.
struct GroupNormInputs {
  GroupNormInputs(const at::Tensor& input, int64_t num_groups, const std::optional<at::Tensor>& weight_C,
                  const std::optional<at::Tensor>& bias_C, const std::optional<at::Tensor>& add_BC,
                  const std::optional<at::Tensor>& scale_BC, const std::optional<at::Tensor>& shift_BC, bool silu);

  at::MemoryFormat layout;
  at::Tensor x, weight, bias, add, scale, shift;  // undefined where not given
  GroupNorm op = {};
};

// Elements per thread below which a thread costs more than it saves.
constexpr int64_t kGrainElements = 16384;

int64_t grain_of(int64_t elements_of_an_item);

}  // namespace emd::cpu
