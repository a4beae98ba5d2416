#include "winograd.h"

#include <ATen/TensorSubclassLikeUtils.h>

#include "kernels.h"
#include "memory.h"
#include "parallel.h"

namespace emd::cpu {
namespace {

// Minimum number of elements per thread. With fewer, a thread costs more than it saves.
constexpr int64_t kGrain = 65536;

// The weight is transformed in every call. One tile saves the cost of that for this many pairs of
// channels. (Measured on two cores: slower for 16 tiles with 256 channels and 64 with 1280, faster
// for 64 with 256 and 128 with 512.)
constexpr int64_t kWeightsWorth = 2048;

bool all_are(int64_t wanted, at::IntArrayRef numbers) {
  return std::all_of(numbers.begin(), numbers.end(), [=](int64_t number) { return number == wanted; });
}

bool is_plain(const at::Tensor& tensor) {
  return tensor.is_cpu() && tensor.scalar_type() == at::kFloat && !tensor.key_set().has_any(at::kTensorSubclassLike);
}

}  // namespace

bool winograd_serves(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                     at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  if (kernels().winograd == nullptr || groups != 1 || !all_are(1, stride) || !all_are(1, padding) ||
      !all_are(1, dilation) || !is_plain(x) || !is_plain(weight) || (bias && !is_plain(*bias)) || x.dim() != 4 ||
      weight.dim() != 4) {
    return false;
  }
  const int64_t in = x.size(1), out = weight.size(0), height = x.size(2), width = x.size(3);
  const int64_t tiles = x.size(0) * ((height + 1) / 2) * ((width + 1) / 2);
  return weight.sizes() == at::IntArrayRef{out, in, 3, 3} && (!bias || bias->sizes() == at::IntArrayRef{out}) &&
         x.numel() > 0 && out > 0 && in % Winograd::kChannels == 0 && out % Winograd::kChannels == 0 && height > 1 &&
         width > 1 && tiles >= in * out / kWeightsWorth && x.stride(1) == 1 &&
         x.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
}

at::Tensor winograd(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& given_bias) {
  TORCH_CHECK(winograd_serves(x, weight, given_bias, {1, 1}, {1, 1}, {1, 1}, 1), "a convolution that is not served: ",
              x.sizes(), " by ", weight.sizes());
  const at::Tensor bias = given_bias ? given_bias->contiguous() : at::Tensor();
  Winograd op = {};
  op.x = x.const_data_ptr<float>();
  op.weight = weight.const_data_ptr<float>();
  op.bias = bias.defined() ? bias.const_data_ptr<float>() : nullptr;
  op.of_sample = x.stride(0);
  op.of_row = x.stride(2);
  op.of_column = x.stride(3);
  std::copy_n(weight.strides().begin(), 4, op.strides);
  op.samples = x.size(0);
  op.in = x.size(1);
  op.height = x.size(2);
  op.width = x.size(3);
  op.out = weight.size(0);
  const at::Tensor y = with_huge_pages(
      at::empty({op.samples, op.out, op.height, op.width}, x.options(), at::MemoryFormat::ChannelsLast));
  // Smaller blocks if there would not be one per thread. At least 6 tiles, for the matmuls.
  const int64_t threads = at::get_num_threads();
  op.block = std::clamp<int64_t>((op.tiles() + threads - 1) / threads, 6, Winograd::kBlock);
  const int64_t scratch = 16 * op.block * (op.in + op.out);
  const at::Tensor products = at::empty({16, op.in, op.out}, x.options());
  const at::Tensor buffers = at::empty({threads, scratch}, x.options());
  op.y = y.mutable_data_ptr<float>();
  op.products = products.mutable_data_ptr<float>();
  op.scratch = buffers.mutable_data_ptr<float>();
  in_parallel(op.in, 1 + kGrain / (64 * op.out), kernels().winograd_weight, op);
  at::parallel_for(0, op.blocks(), 1 + kGrain / (64 * op.block * op.in), [&](int64_t first, int64_t last) {
    Winograd mine = op;
    mine.scratch += at::get_thread_num() * scratch;
    kernels().winograd(mine, first, last);
  });
  return y;
}

}  // namespace emd::cpu
