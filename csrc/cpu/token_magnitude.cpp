// alpha / sqrt(L * d) for every token, where L is the length of its own sequence. neft_kernels/ops/magnitude.py computes the
// same in plain torch.
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

#include "../registration.h"

namespace neft {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const int64_t* data_of(const std::optional<Tensor>& tensor) {
  if (!tensor) return nullptr;
  STD_TORCH_CHECK(tensor->scalar_type() == ScalarType::Long && tensor->is_contiguous(),
                  "attention_mask and position_ids must be contiguous and int64");
  return static_cast<const int64_t*>(tensor->const_data_ptr());
}

// Whether a sequence begins at a token with this position, after a token with the position `before`.
bool begins(int64_t position, int64_t before, bool has_mask) {
  return has_mask ? position < before || position == 0 : position != before + 1;
}

// One row of `length` tokens. `mask` and `positions` may be null, but not both.
class Row {
 public:
  Row(int64_t length, double alpha, int64_t embedding_dim)
      : length_(length), alpha_(alpha), embedding_dim_(embedding_dim), sequence_(length), tokens_(length + 1) {}

  void fill(const int64_t* mask, const int64_t* positions, float* out) {
    std::fill(tokens_.begin(), tokens_.end(), 0);
    const auto is_present = [&](int64_t t) { return mask == nullptr || mask[t] != 0; };
    int64_t first = length_;  // of the tokens that are present
    int64_t before = 1;       // the position of the token before; padding continues where the last token before it was
    for (int64_t t = 0, run = 0; t < length_; ++t) {
      if (is_present(t)) first = std::min(first, t);
      if (positions != nullptr) {
        const int64_t position = is_present(t) ? positions[t] : before == 0 ? 1 : before;
        run += t > 0 && begins(position, before, mask != nullptr);
        before = position;
        sequence_[t] = run;
      } else {
        sequence_[t] = std::clamp<int64_t>(mask[t], 0, length_);
      }
      // Without positions, a token whose mask is 0 or negative belongs to no sequence.
      tokens_[sequence_[t]] += is_present(t) && (positions != nullptr || mask[t] > 0);
    }

    // Packing collators pad positions with 0, and give no mask or one of 1, so each padding token at the end looks like a
    // sequence of one. It is none if padding that the mask tells stands before it.
    int64_t end = length_;
    const auto begins_at = [&](int64_t t) { return t == length_ || t == 0 || sequence_[t] != sequence_[t - 1]; };
    if (positions != nullptr && length_ > 1) {
      if (mask == nullptr)
        while (end > 0 && tokens_[sequence_[end - 1]] <= 1) --end;
      else
        while (end > 0 && is_present(end - 1) && begins_at(end) && (begins_at(end - 1) || end - 1 == first)) --end;
      if (end > 0 && !is_present(end - 1)) end = length_;
    }

    for (int64_t t = 0; t < length_; ++t) {
      const int64_t tokens = tokens_[sequence_[t]];
      // transformers gives padding on the left the position 1, so each token of it looks like a sequence of one.
      const bool is_filling = mask == nullptr && tokens == 1 && positions[t] == 1 && length_ > 1;
      const bool noisy = t < end && !is_filling && is_present(t) && (positions != nullptr || mask[t] > 0);
      // Neighbouring tokens of equal length share a square root.
      if (tokens != last_tokens_) {
        last_tokens_ = tokens;
        const double elements = static_cast<double>(std::max<int64_t>(tokens, 1)) * static_cast<double>(embedding_dim_);
        last_magnitude_ = static_cast<float>(alpha_ / std::sqrt(elements));
      }
      out[t] = noisy ? last_magnitude_ : 0.0f;
    }
  }

 private:
  int64_t length_;
  double alpha_;
  int64_t embedding_dim_;
  std::vector<int64_t> sequence_, tokens_;  // the sequence of each token; the number of tokens of each sequence
  int64_t last_tokens_ = -1;
  float last_magnitude_ = 0;
};

Tensor token_magnitude(const std::optional<Tensor>& attention_mask, const std::optional<Tensor>& position_ids, double alpha,
                       int64_t embedding_dim) {
  STD_TORCH_CHECK(attention_mask || position_ids, "attention_mask or position_ids must be given");
  const Tensor& given = attention_mask ? *attention_mask : *position_ids;
  const std::vector<int64_t> sizes(given.sizes().begin(), given.sizes().end());
  STD_TORCH_CHECK(!sizes.empty(), "attention_mask and position_ids must have at least 1 dimension");
  if (attention_mask && position_ids) {
    const std::vector<int64_t> other(position_ids->sizes().begin(), position_ids->sizes().end());
    STD_TORCH_CHECK(sizes == other, "attention_mask and position_ids must have one shape");
  }
  Tensor out = torch::stable::new_empty(given, sizes, ScalarType::Float);
  const int64_t length = sizes.back();
  if (given.numel() == 0) return out;
  const int64_t* mask = data_of(attention_mask);
  const int64_t* positions = data_of(position_ids);
  auto* magnitudes = static_cast<float*>(out.mutable_data_ptr());

  constexpr int64_t kTokensPerThread = 8192;  // about 20 microseconds
  const int64_t grain = std::max<int64_t>(1, kTokensPerThread / length);
  torch::stable::parallel_for(0, given.numel() / length, grain, [&](int64_t first, int64_t last) {
    Row row(length, alpha, embedding_dim);
    for (int64_t r = first; r < last; ++r)
      row.fill(mask ? mask + r * length : nullptr, positions ? positions + r * length : nullptr, magnitudes + r * length);
  });
  return out;
}

const Registration registration("token_magnitude.cpu", TORCH_BOX(&token_magnitude));

}  // namespace
}  // namespace neft
