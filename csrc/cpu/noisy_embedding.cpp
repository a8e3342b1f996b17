// noisy_embedding on the CPU: out[t] = weight[input_ids[t]] + magnitude[t] * noise(seed, stream, first_token + t)
#include <sstream>
#include <vector>

#include "../registration.h"
#include "tensor_rows.h"

namespace neft {
namespace {

// Throws std::out_of_range, an IndexError in Python. The message names the id and its position.
[[noreturn]] void throw_id_out_of_range(const Tensor& input_ids, int64_t token, int64_t id, int64_t num_embeddings) {
  std::vector<int64_t> position(input_ids.dim());
  for (int64_t dim = input_ids.dim() - 1; dim >= 0; --dim) {
    position[dim] = token % input_ids.size(dim);
    token /= input_ids.size(dim);
  }
  std::ostringstream message;
  message << "input_ids[";
  for (size_t dim = 0; dim < position.size(); ++dim) message << (dim ? ", " : "") << position[dim];
  message << "] is " << id << ", but ids must be in [0, " << num_embeddings << "), the rows of weight";
  throw std::out_of_range(message.str());
}

template <class Id>
Tensor noisy_embedding_of(const Tensor& input_ids, const Tensor& weight, const Noise& noise) {
  const int64_t num_tokens = input_ids.numel(), num_embeddings = weight.size(0), embedding_dim = weight.size(1);
  const auto* ids = static_cast<const Id*>(input_ids.const_data_ptr());
  const Offsets id_offset(input_ids, input_ids.dim());
  for (int64_t token = 0; token < num_tokens; ++token) {
    const int64_t id = ids[id_offset(token)];
    if (id < 0 || id >= num_embeddings) throw_id_out_of_range(input_ids, token, id, num_embeddings);
  }

  std::vector<int64_t> sizes(input_ids.sizes().begin(), input_ids.sizes().end());
  sizes.push_back(embedding_dim);
  Tensor out = torch::stable::new_empty(weight, sizes);
  const int64_t row_stride = weight.stride(0);
  const auto row_of = [&](int64_t token) { return static_cast<int64_t>(ids[id_offset(token)]) * row_stride; };
  add_noise_to_rows(weight, row_of, weight.stride(1), out, num_tokens, embedding_dim, noise);
  return out;
}

// padding_idx, scale_grad_by_freq and sparse are for the gradient.
Tensor noisy_embedding(const Tensor& input_ids, const Tensor& weight, const Tensor& seed,
                       const std::optional<Tensor>& token_magnitude, double magnitude, int64_t stream,
                       int64_t first_token, int64_t /*padding_idx*/, bool /*scale_grad_by_freq*/, bool /*sparse*/,
                       int64_t kind, bool symmetric) {
  STD_TORCH_CHECK(weight.dim() == 2, "weight must have 2 dimensions");
  const Noise noise(seed, token_magnitude, magnitude, stream, first_token, kind, symmetric, input_ids.numel());
  switch (input_ids.scalar_type()) {
    case ScalarType::Long: return noisy_embedding_of<int64_t>(input_ids, weight, noise);
    case ScalarType::Int: return noisy_embedding_of<int32_t>(input_ids, weight, noise);
    default: throw std::invalid_argument("input_ids must be int32 or int64");
  }
}

const Registration registration("noisy_embedding.cpu", TORCH_BOX(&noisy_embedding));

}  // namespace
}  // namespace neft
