// The gradient of an embedding on the CPU: out[id] = the sum of grad[t] over all tokens t of that id, 0 where there is none.
//
// Each sum is computed in fp64, in the order of the tokens, and rounded once. It therefore does not depend on the number of
// threads, nor on how they share the work.
#include <algorithm>
#include <cstring>
#include <vector>

#include "../registration.h"
#include "tensor_rows.h"

namespace neft {
namespace {

// The tokens sorted by their ids. Tokens of one id are adjacent and keep their order.
struct TokensById {
  std::vector<int64_t> ids;     // the ids that occur, ascending
  std::vector<int64_t> begins;  // the index in `rows` of the first token of each id, and the end
  std::vector<int64_t> rows;    // the offset of the gradient of each token, in bytes; the last one twice
};

template <class Id>
TokensById sort_by_id(const Tensor& input_ids, int64_t num_embeddings, int64_t padding_idx, int64_t row_bytes) {
  const int64_t num_tokens = input_ids.numel();
  const auto* ids = static_cast<const Id*>(input_ids.const_data_ptr());
  const Offsets id_offset(input_ids, input_ids.dim());
  std::vector<int64_t> begin_of_id(num_embeddings + 1, 0);
  for (int64_t token = 0; token < num_tokens; ++token) {
    const int64_t id = ids[id_offset(token)];
    STD_TORCH_CHECK(id >= 0 && id < num_embeddings, "input_ids must be in [0, ", num_embeddings, "), but one is ", id);
    begin_of_id[id + 1] += id != padding_idx;
  }
  TokensById sorted;
  for (int64_t id = 0; id < num_embeddings; ++id) {
    if (begin_of_id[id + 1] != 0) {
      sorted.ids.push_back(id);
      sorted.begins.push_back(begin_of_id[id]);
    }
    begin_of_id[id + 1] += begin_of_id[id];
  }
  sorted.begins.push_back(begin_of_id[num_embeddings]);
  sorted.rows.resize(sorted.begins.back() + 1);
  for (int64_t token = 0; token < num_tokens; ++token) {
    const int64_t id = ids[id_offset(token)];
    if (id != padding_idx) sorted.rows[begin_of_id[id]++] = token * row_bytes;
  }
  if (!sorted.ids.empty()) sorted.rows.back() = sorted.rows.end()[-2];
  return sorted;
}

// Rows of large outputs to which nothing is added are not written, see fresh_pages.h. To write zeros is faster where the memory
// has its pages already.
Tensor zeros_like_rows_of(const Tensor& grad, int64_t num_rows, int64_t num_columns, int64_t size) {
  const int64_t bytes = num_rows * num_columns * size;
  if (bytes >= kAlwaysFresh) {
    Tensor out = torch::stable::new_empty(grad, {num_rows, num_columns});
    auto* data = static_cast<char*>(out.mutable_data_ptr());
    if (has_pages(data, bytes)) {
      constexpr int64_t kBytesPerThread = int64_t{1} << 20;
      torch::stable::parallel_for(0, bytes, kBytesPerThread,
                                  [&](int64_t first, int64_t last) { std::memset(data + first, 0, last - first); });
      return out;
    }
    prefer_huge_pages(data, bytes);
    if (zero_without_writing(data, bytes)) return out;
  }
  return torch::stable::new_zeros(grad, {num_rows, num_columns});
}

void sum_rows(const Tensor& grad, char* out, const TokensById& sorted, int64_t num_columns, bool scale_grad_by_freq) {
  // The unit of work is a token's piece of a row. The units of an id are in order of their pieces, so that several threads
  // share an id that occurs often, and a thread takes the pieces that begin among its units.
  constexpr int64_t kPieceColumns = 1024, kColumnsPerThread = 16 * kPieceColumns;
  const ElementKernel kernel = element_kernel(grad.scalar_type());
  const auto* data = static_cast<const char*>(grad.const_data_ptr());
  const int64_t pieces = (num_columns + kPieceColumns - 1) / kPieceColumns;
  const int64_t grain = std::max<int64_t>(1, kColumnsPerThread / std::min(num_columns, kPieceColumns));
  torch::stable::parallel_for(0, sorted.begins.back() * pieces, grain, [&](int64_t first, int64_t last) {
    auto begin = std::upper_bound(sorted.begins.begin(), sorted.begins.end(), first / pieces) - 1;
    for (; begin[0] * pieces < last; ++begin) {
      const int64_t count = begin[1] - begin[0];
      const int64_t id = sorted.ids[begin - sorted.begins.begin()];
      const auto pieces_before = [&](int64_t unit) {
        return std::clamp<int64_t>((unit - begin[0] * pieces + count - 1) / count, 0, pieces);
      };
      const int64_t first_column = pieces_before(first) * kPieceColumns;
      const int64_t end_column = std::min(num_columns, pieces_before(last) * kPieceColumns);
      if (first_column >= end_column) continue;
      kernel.sum(data, sorted.rows.data() + begin[0], count, first_column, end_column, scale_grad_by_freq ? count : 1,
                 out + id * num_columns * kernel.size);
    }
  });
}

Tensor embedding_grad(const Tensor& grad_output, const Tensor& input_ids, int64_t num_embeddings, int64_t padding_idx,
                      bool scale_grad_by_freq) {
  STD_TORCH_CHECK(grad_output.dim() == input_ids.dim() + 1, "grad must have one dimension more than input_ids");
  for (int64_t dim = 0; dim < input_ids.dim(); ++dim)
    STD_TORCH_CHECK(grad_output.size(dim) == input_ids.size(dim), "grad must have the shape of input_ids, and columns");
  STD_TORCH_CHECK(num_embeddings >= 0, "num_embeddings must be >= 0");
  const Tensor grad = torch::stable::contiguous(grad_output);
  const int64_t num_columns = grad.size(-1), size = element_kernel(grad.scalar_type()).size, row_bytes = num_columns * size;

  TokensById sorted;
  switch (input_ids.scalar_type()) {
    case ScalarType::Long: sorted = sort_by_id<int64_t>(input_ids, num_embeddings, padding_idx, row_bytes); break;
    case ScalarType::Int: sorted = sort_by_id<int32_t>(input_ids, num_embeddings, padding_idx, row_bytes); break;
    default: throw std::invalid_argument("input_ids must be int32 or int64");
  }
  Tensor out = zeros_like_rows_of(grad, num_embeddings, num_columns, size);
  if (out.numel() == 0) return out;
  sum_rows(grad, static_cast<char*>(out.mutable_data_ptr()), sorted, num_columns, scale_grad_by_freq);
  return out;
}

const Registration registration("embedding_grad.cpu", TORCH_BOX(&embedding_grad));

}  // namespace
}  // namespace neft
