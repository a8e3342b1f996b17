// A tensor as rows of its last dimension, and the loop that adds noise to every row.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <stdexcept>

#include "fresh_pages.h"
#include "rows.h"

namespace neft {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Maps a flat index over the first `dims` dimensions of a strided tensor to an offset. Dimensions that one stride can
// describe are merged, so that a contiguous tensor costs one multiplication.
class Offsets {
 public:
  Offsets(const Tensor& tensor, int64_t dims) {
    for (int64_t dim = 0; dim < dims; ++dim) {
      const int64_t size = tensor.size(dim), stride = tensor.stride(dim);
      if (size == 1) continue;
      if (count_ > 0 && strides_[count_ - 1] == size * stride) {
        sizes_[count_ - 1] *= size;
        strides_[count_ - 1] = stride;
        continue;
      }
      STD_TORCH_CHECK(count_ < kMaxDims, "more than ", kMaxDims, " dimensions that do not lie evenly in memory");
      sizes_[count_] = size;
      strides_[count_++] = stride;
    }
  }

  int64_t operator()(int64_t index) const {
    if (count_ == 0) return 0;
    int64_t offset = 0;
    for (int dim = count_ - 1; dim > 0; --dim) {
      offset += index % sizes_[dim] * strides_[dim];
      index /= sizes_[dim];
    }
    return offset + index * strides_[0];
  }

 private:
  static constexpr int kMaxDims = 16;
  int count_ = 0;
  int64_t sizes_[kMaxDims], strides_[kMaxDims];
};

// The arguments of the noise, read from their tensors. Throws std::invalid_argument, a ValueError in Python, if a magnitude
// is negative, infinite or NaN.
class Noise {
 public:
  Noise(const Tensor& seed, const std::optional<Tensor>& token_magnitude, double magnitude, int64_t stream,
        int64_t first_token, int64_t kind, bool symmetric, int64_t num_tokens)
      : kind_(static_cast<NoiseKind>(kind)), first_token_(first_token), copies_(symmetric ? 2 : 1),
        stream_(static_cast<uint32_t>(stream)), magnitude_(static_cast<float>(magnitude)) {
    STD_TORCH_CHECK(0 <= kind && kind < kNoiseKinds, "noise must be in [0, ", kNoiseKinds, ")");
    STD_TORCH_CHECK(!symmetric || num_tokens % 2 == 0, "symmetric noise needs an even number of tokens");
    STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long && seed.numel() == 1, "seed must be one int64 element");
    seed_ = *static_cast<const int64_t*>(seed.const_data_ptr());
    if (token_magnitude) {
      STD_TORCH_CHECK(token_magnitude->scalar_type() == ScalarType::Float && token_magnitude->numel() == num_tokens,
                      "token_magnitude must be fp32, one element per token");
      token_magnitudes_ = static_cast<const float*>(token_magnitude->const_data_ptr());
      offsets_.emplace(*token_magnitude, token_magnitude->dim());
    }
    for (int64_t token = 0; token < (token_magnitudes_ ? num_tokens : 1); ++token) {
      const float m = magnitude_of(token);
      if (!(m >= 0) || std::isinf(m))
        throw std::invalid_argument("magnitude must be finite and >= 0, but is " + std::to_string(m) + " at token " +
                                    std::to_string(token));
    }
  }

  NoiseKind kind() const { return kind_; }

  // The number of tokens with the same noise: 2 if it is symmetric. The second one gets it with the other sign.
  int copies() const { return copies_; }

  // That of token `index` of the first half, or of all tokens if the noise is not symmetric.
  RowNoise of(int64_t index) const {
    return {seed_, static_cast<int64_t>(static_cast<uint64_t>(first_token_) + static_cast<uint64_t>(index)), stream_};
  }

  float magnitude_of(int64_t token) const {
    return token_magnitudes_ ? token_magnitudes_[(*offsets_)(token)] : magnitude_;
  }

 private:
  NoiseKind kind_;
  int64_t seed_, first_token_;
  int copies_;
  uint32_t stream_;
  float magnitude_;
  const float* token_magnitudes_ = nullptr;
  std::optional<Offsets> offsets_;
};

struct ElementKernel {
  int64_t size;  // bytes
  const AddNoiseToRows* add_noise;  // by the number of rows, less one
  SumRows sum;
};

inline ElementKernel element_kernel(ScalarType dtype, NoiseKind kind = NoiseKind::kUniform) {
  const RowKernels& kernels = row_kernels();
  const NoiseKernels& noise = kernels.noise[static_cast<int64_t>(kind)];
  switch (dtype) {
    case ScalarType::Float: return {4, noise.fp32, kernels.sum_fp32};
    case ScalarType::Double: return {8, noise.fp64, kernels.sum_fp64};
    case ScalarType::Half: return {2, noise.fp16, kernels.sum_fp16};
    case ScalarType::BFloat16: return {2, noise.bf16, kernels.sum_bf16};
    default: throw std::invalid_argument("the element type must be fp32, fp64, fp16 or bf16");
  }
}

inline void copy_strided(const char* in, char* out, int64_t count, int64_t stride, int64_t size) {
  for (int64_t i = 0; i < count; ++i) std::memcpy(out + i * size, in + i * stride * size, size);
}

// out[token] = source(token) + noise, for every token. `source` maps a token to the offset of its row in `data`, in
// elements; the columns of a row lie `column_stride` elements apart. `out` is contiguous.
template <class Source>
void add_noise_to_rows(const Tensor& data, const Source& source, int64_t column_stride, Tensor& out, int64_t num_tokens,
                       int64_t num_columns, const Noise& noise) {
  if (num_tokens == 0 || num_columns == 0) return;
  const ElementKernel kernel = element_kernel(out.scalar_type(), noise.kind());
  const auto* in_data = static_cast<const char*>(data.const_data_ptr());
  auto* out_data = static_cast<char*>(out.mutable_data_ptr());
  prefer_huge_pages(out_data, num_tokens * num_columns * kernel.size);

  // The unit of work is a piece of a row, so that all threads have work with many short rows and with one long row. A thread
  // gets at least about 10 microseconds of work.
  constexpr int64_t kPieceColumns = 16 * kColumnAlignment, kColumnsPerThread = 8 * kPieceColumns;
  const int64_t pieces = (num_columns + kPieceColumns - 1) / kPieceColumns;
  const int64_t grain = std::max<int64_t>(1, kColumnsPerThread / std::min(num_columns, kPieceColumns));
  const int64_t draws = num_tokens / noise.copies();  // tokens of the first copy

  torch::stable::parallel_for(0, draws * pieces, grain, [&](int64_t first, int64_t last) {
    for (int64_t unit = first; unit < last;) {
      const int64_t index = unit / pieces, piece = unit % pieces;
      const int64_t units_of_row = std::min(last - unit, pieces - piece);
      const int64_t begin = piece * kPieceColumns, end = std::min(num_columns, begin + units_of_row * kPieceColumns);
      unit += units_of_row;

      Row rows[kMaxRows];
      int count = 0;
      for (int copy = 0; copy < noise.copies(); ++copy) {
        const int64_t token = index + copy * draws;
        const float magnitude = noise.magnitude_of(token);
        const char* in = in_data + source(token) * kernel.size;
        const char* next = unit < last ? in_data + source(unit / pieces + copy * draws) * kernel.size : in;
        char* row = out_data + token * num_columns * kernel.size;
        if (column_stride != 1) {
          copy_strided(in + begin * column_stride * kernel.size, row + begin * kernel.size, end - begin, column_stride,
                       kernel.size);
          in = row;
        } else if (magnitude == 0) {
          std::memcpy(row + begin * kernel.size, in + begin * kernel.size, (end - begin) * kernel.size);
        }
        if (magnitude != 0) rows[count++] = {in, next, row, copy == 0 ? magnitude : -magnitude};
      }
      if (count > 0) kernel.add_noise[count - 1](rows, begin, end, noise.of(index));
    }
  });
}

}  // namespace neft
