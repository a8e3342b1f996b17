// add_noise on CUDA: out[t] = embeds[t] + magnitude[t] * noise(seed, stream, first_token + t)
#include <vector>

#include "../registration.h"
#include "tensor_rows.cuh"

namespace neft {
namespace {

// The stride between rows over all dimensions but the last; none if it is not constant.
std::optional<int64_t> row_stride_of(const Tensor& embeds) {
  int64_t stride = 0, rows = 1;
  for (int64_t dim = embeds.dim() - 2; dim >= 0; --dim) {
    if (embeds.size(dim) == 1) continue;
    if (rows == 1) stride = embeds.stride(dim);
    if (embeds.stride(dim) != stride * rows) return std::nullopt;
    rows *= embeds.size(dim);
  }
  return stride;
}

Tensor add_noise(const Tensor& embeds, const Tensor& seed, const std::optional<Tensor>& token_magnitude,
                 double magnitude, int64_t stream, int64_t first_token, int64_t kind, bool symmetric) {
  STD_TORCH_CHECK(embeds.dim() >= 1, "embeds must have at least 1 dimension");
  check_device(embeds, "embeds", embeds);
  const std::vector<int64_t> sizes(embeds.sizes().begin(), embeds.sizes().end());
  int64_t num_tokens = 1;
  for (size_t dim = 0; dim + 1 < sizes.size(); ++dim) num_tokens *= sizes[dim];

  const Noise noise(embeds, seed, token_magnitude, magnitude, stream, first_token, kind, symmetric, num_tokens);
  const Tensor out = torch::stable::new_empty(embeds, sizes);
  const Tensor data = row_stride_of(embeds) ? embeds : torch::stable::contiguous(embeds);
  const int64_t column_stride = data.stride(data.dim() - 1);
  add_noise_to_rows(data, RowOfToken{}, *row_stride_of(data), column_stride, out, num_tokens, sizes.back(), noise);
  return out;
}

const Registration registration("add_noise.cuda", TORCH_BOX(&add_noise));

}  // namespace
}  // namespace neft
