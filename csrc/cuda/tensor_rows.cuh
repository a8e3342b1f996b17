// Tensors as rows, and the kernel that adds noise to every row. Mirrors csrc/cpu/tensor_rows.h.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <stdexcept>

#include "rows.cuh"

namespace neft {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Reading another device's memory is an error after which the process cannot use this device any more.
inline void check_device(const Tensor& tensor, const char* name, const Tensor& data) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == data.get_device_index(), name,
                  " must be on the CUDA device of the embeddings");
}

// The arguments of the noise. Only the kernel reads the magnitudes of the tokens, and the seed if it is on the device. A
// seed on the CPU is given to the kernel by value.
class Noise {
 public:
  Noise(const Tensor& data, const Tensor& seed, const std::optional<Tensor>& token_magnitude, double magnitude,
        int64_t stream, int64_t first_token, int64_t kind, bool symmetric, int64_t num_tokens)
      : kind_(static_cast<NoiseKind>(kind)), seed_(seed), magnitude_(static_cast<float>(magnitude)),
        stream_(static_cast<uint32_t>(stream)), first_token_(first_token),
        half_(symmetric ? num_tokens / 2 : 0) {
    STD_TORCH_CHECK(0 <= kind && kind < kNoiseKinds, "noise must be in [0, ", kNoiseKinds, ")");
    STD_TORCH_CHECK(!symmetric || num_tokens % 2 == 0, "symmetric noise needs an even number of tokens");
    STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long && seed.numel() == 1, "seed must be one int64 element");
    if (seed.is_cpu())
      seed_value_ = *static_cast<const int64_t*>(seed.const_data_ptr());
    else
      check_device(seed, "seed", data);
    if (token_magnitude) {
      STD_TORCH_CHECK(token_magnitude->scalar_type() == ScalarType::Float && token_magnitude->numel() == num_tokens,
                      "token_magnitude must be fp32, one element per token");
      check_device(*token_magnitude, "token_magnitude", data);
      token_magnitude_ = torch::stable::contiguous(*token_magnitude);
    }
  }

  NoiseKind kind() const { return kind_; }

  template <class RowOf>
  void set(Rows<RowOf>& rows) const {
    rows.seed = seed_.is_cpu() ? nullptr : static_cast<const int64_t*>(seed_.const_data_ptr());
    rows.seed_value = seed_value_;
    rows.token_magnitude =
        token_magnitude_ ? static_cast<const float*>(token_magnitude_->const_data_ptr()) : nullptr;
    rows.magnitude = magnitude_;
    rows.stream = stream_;
    rows.first_token = first_token_;
    rows.half = half_;
  }

 private:
  NoiseKind kind_;
  Tensor seed_;
  int64_t seed_value_ = 0;
  std::optional<Tensor> token_magnitude_;
  float magnitude_;
  uint32_t stream_;
  int64_t first_token_, half_;
};

template <class Element, NoiseKind kind, bool kAligned, class RowOf>
__global__ void __launch_bounds__(kLanes* kWarps) noisy_rows_kernel(Rows<RowOf> rows) {
  const auto index = [](const auto& xyz) { return Index{xyz.x, xyz.y, xyz.z}; };
  const Place place = place_of<Element>(index(gridDim), index(blockDim), index(blockIdx), index(threadIdx));
  add_noise_to_rows<Element, kind, kAligned>(rows, place);
}

template <class Element, NoiseKind kind, class RowOf>
void launch_kind(Rows<RowOf> rows, cudaStream_t stream) {
  const LaunchPlan plan = plan_launch<Element>(rows);
  const dim3 grid(plan.grid.x, plan.grid.y, plan.grid.z), threads(plan.threads.x, plan.threads.y, plan.threads.z);
  if (plan.aligned)
    noisy_rows_kernel<Element, kind, true><<<grid, threads, 0, stream>>>(rows);
  else
    noisy_rows_kernel<Element, kind, false><<<grid, threads, 0, stream>>>(rows);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <class Element, class RowOf>
void launch(const Rows<RowOf>& rows, NoiseKind kind, cudaStream_t stream) {
  switch (kind) {
    case NoiseKind::kUniform: return launch_kind<Element, NoiseKind::kUniform>(rows, stream);
    case NoiseKind::kSign: return launch_kind<Element, NoiseKind::kSign>(rows, stream);
    case NoiseKind::kGaussian: return launch_kind<Element, NoiseKind::kGaussian>(rows, stream);
  }
}

// out[token] = data[row_of(token)] + noise, for every token. `out` is contiguous. Does not wait for the device.
template <class RowOf>
void add_noise_to_rows(const Tensor& data, RowOf row_of, int64_t row_stride, int64_t column_stride, const Tensor& out,
                       int64_t num_tokens, int64_t num_columns, const Noise& noise) {
  if (num_tokens == 0 || num_columns == 0) return;
  Rows<RowOf> rows{data.const_data_ptr(), out.mutable_data_ptr(), row_of, row_stride, column_stride, num_tokens,
                   num_columns};
  noise.set(rows);

  const torch::stable::accelerator::DeviceGuard guard(data.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(data.get_device_index(), &stream));
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  switch (data.scalar_type()) {
    case ScalarType::Float: return launch<Fp32>(rows, noise.kind(), cuda_stream);
    case ScalarType::Double: return launch<Fp64>(rows, noise.kind(), cuda_stream);
    case ScalarType::Half: return launch<Fp16>(rows, noise.kind(), cuda_stream);
    case ScalarType::BFloat16: return launch<Bf16>(rows, noise.kind(), cuda_stream);
    default: throw std::invalid_argument("the element type must be fp32, fp64, fp16 or bf16");
  }
}

}  // namespace neft
