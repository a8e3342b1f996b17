// add_noise on the CPU: out[t] = embeds[t] + magnitude[t] * noise(seed, stream, first_token + t)
#include <vector>

#include "../registration.h"
#include "tensor_rows.h"

namespace neft {
namespace {

Tensor add_noise(const Tensor& embeds, const Tensor& seed, const std::optional<Tensor>& token_magnitude,
                 double magnitude, int64_t stream, int64_t first_token, int64_t kind, bool symmetric) {
  const int64_t leading = embeds.dim() - 1;
  STD_TORCH_CHECK(leading >= 0, "embeds must have at least 1 dimension");
  const std::vector<int64_t> sizes(embeds.sizes().begin(), embeds.sizes().end());
  const int64_t num_columns = sizes.back();
  int64_t num_tokens = 1;
  for (int64_t dim = 0; dim < leading; ++dim) num_tokens *= sizes[dim];

  const Noise noise(seed, token_magnitude, magnitude, stream, first_token, kind, symmetric, num_tokens);
  Tensor out = torch::stable::new_empty(embeds, sizes);
  add_noise_to_rows(embeds, Offsets(embeds, leading), embeds.stride(leading), out, num_tokens, num_columns, noise);
  return out;
}

const Registration registration("add_noise.cpu", TORCH_BOX(&add_noise));

}  // namespace
}  // namespace neft
