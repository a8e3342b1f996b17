// noisy_embedding on CUDA: out[t] = weight[input_ids[t]] + magnitude[t] * noise(seed, stream, first_token + t), and
// NaN where the id is out of range.
#include <vector>

#include "../registration.h"
#include "tensor_rows.cuh"

namespace neft {
namespace {

template <class Id>
Tensor noisy_embedding_of(const Tensor& input_ids, const Tensor& weight, const Noise& noise) {
  std::vector<int64_t> sizes(input_ids.sizes().begin(), input_ids.sizes().end());
  sizes.push_back(weight.size(1));
  const Tensor out = torch::stable::new_empty(weight, sizes), ids = torch::stable::contiguous(input_ids);
  const RowOfId<Id> row_of{static_cast<const Id*>(ids.const_data_ptr()), weight.size(0)};
  add_noise_to_rows(weight, row_of, weight.stride(0), weight.stride(1), out, ids.numel(), weight.size(1), noise);
  return out;
}

// padding_idx, scale_grad_by_freq and sparse are for the gradient.
Tensor noisy_embedding(const Tensor& input_ids, const Tensor& weight, const Tensor& seed,
                       const std::optional<Tensor>& token_magnitude, double magnitude, int64_t stream,
                       int64_t first_token, int64_t /*padding_idx*/, bool /*scale_grad_by_freq*/, bool /*sparse*/,
                       int64_t kind, bool symmetric) {
  STD_TORCH_CHECK(weight.dim() == 2, "weight must have 2 dimensions");
  check_device(weight, "weight", weight);
  check_device(input_ids, "input_ids", weight);
  const Noise noise(weight, seed, token_magnitude, magnitude, stream, first_token, kind, symmetric, input_ids.numel());
  switch (input_ids.scalar_type()) {
    case ScalarType::Long: return noisy_embedding_of<int64_t>(input_ids, weight, noise);
    case ScalarType::Int: return noisy_embedding_of<int32_t>(input_ids, weight, noise);
    default: throw std::invalid_argument("input_ids must be int32 or int64");
  }
}

const Registration registration("noisy_embedding.cuda", TORCH_BOX(&noisy_embedding));

}  // namespace
}  // namespace neft
