// group_norm by the CUDA kernels. The CPU has its own in cpu/group_norm.h, with the same arguments.
#pragma once

#include <array>

#include "../tensors.h"

namespace emd {

std::tuple<at::Tensor, at::Tensor, at::Tensor> cuda_group_norm(
    const at::Tensor& x, int64_t num_groups, const std::optional<at::Tensor>& weight,
    const std::optional<at::Tensor>& bias, double eps, const std::optional<at::Tensor>& add,
    const std::optional<at::Tensor>& scale, const std::optional<at::Tensor>& shift, bool silu);

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> cuda_group_norm_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& mean, const at::Tensor& rstd, int64_t num_groups,
    const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& add, const std::optional<at::Tensor>& scale,
    const std::optional<at::Tensor>& shift, bool silu, std::array<bool, 6> needs);

}  // namespace emd
