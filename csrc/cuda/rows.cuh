// What one thread of the CUDA kernels does, and how many threads there are. Compiled for the device. A test also compiles it
// for the host, and executes every thread of a launch without a GPU.
//
// A thread adds noise to four blocks of columns of one row (two in fp64). It loads all of these 64 bytes before it uses the
// first. Neighbouring lanes have neighbouring blocks, so each load and store of a warp covers 512 consecutive bytes. In fp64 a
// block is two vectors: one access covers one half of each 32 bytes, and the next access the other half.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>

#include "elements.cuh"

namespace neft {

constexpr uint32_t kLanes = 32;  // of a warp
constexpr uint32_t kWarps = 4;   // of a block of threads
constexpr int kBytesPerThread = 64;

template <class Element>
constexpr int kBlocksPerThread = kBytesPerThread / (16 * ColumnBlock<Element>::kVectors);

template <class Element>
constexpr uint32_t kBlocksPerWarp = kLanes * kBlocksPerThread<Element>;

// The rows to read and write, and the noise to give them. `RowOf` maps a token to the row that it reads.
template <class RowOf>
struct Rows {
  const void* in;
  void* out;  // [num_tokens, num_columns], contiguous
  RowOf row_of;
  int64_t row_stride, column_stride;  // of `in`, in elements
  int64_t num_tokens, num_columns;

  const int64_t* seed;  // null: the seed is `seed_value`
  int64_t seed_value;
  const float* token_magnitude;  // null: every token gets `magnitude`
  float magnitude;
  uint32_t stream;
  int64_t first_token;
  int64_t half;  // num_tokens / 2 if the second half gets the noise of the first, negated; or else 0

  uint32_t num_blocks = 0;  // of columns, in a row; set by plan_launch()
};

struct RowOfToken {
  static constexpr bool kMayBeNone = false;
  NEFT_FUNCTION int64_t operator()(int64_t token) const { return token; }
};

template <class Id>
struct RowOfId {
  static constexpr bool kMayBeNone = true;
  const Id* ids;  // [num_tokens]
  int64_t num_rows;
  // Negative if the id is out of range.
  NEFT_FUNCTION int64_t operator()(int64_t token) const {
    const int64_t id = ids[token];
    return id < num_rows ? id : -1;
  }
};

// Threads of a block: (lane, warp of a row, row). Blocks of the grid: (rows, blocks of a row, more rows).
struct Index {
  uint32_t x, y, z;
};

struct LaunchPlan {
  Index grid, threads;
  // Whether all blocks of columns are whole, and aligned to 16 bytes in `in` and in `out`.
  bool aligned;
};

// Sets rows.num_blocks.
template <class Element, class RowOf>
LaunchPlan plan_launch(Rows<RowOf>& rows) {
  constexpr int64_t kMaxGridX = 0x7FFFFFFF, kMaxGridY = 65535, kMaxBlocks = 0x7FFFFFFF;
  constexpr int kColumns = ColumnBlock<Element>::kColumns, kSize = sizeof(typename Element::Bits);
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };

  const int64_t num_blocks = ceil_div(rows.num_columns, kColumns);
  if (num_blocks > kMaxBlocks) throw std::invalid_argument("the rows have too many columns");
  rows.num_blocks = static_cast<uint32_t>(num_blocks);

  const auto on_16_bytes = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  const bool aligned = rows.num_columns % kColumns == 0 && rows.column_stride == 1 &&
                       rows.row_stride * kSize % 16 == 0 && on_16_bytes(rows.in) && on_16_bytes(rows.out);

  const int64_t warps_of_row = ceil_div(num_blocks, kBlocksPerWarp<Element>);
  // The number of warps on a row that leaves the fewest warps without work.
  uint32_t warps = kWarps;
  for (uint32_t fewer = warps / 2; fewer > 0; fewer /= 2)
    if (ceil_div(warps_of_row, fewer) * fewer < ceil_div(warps_of_row, warps) * warps) warps = fewer;

  const uint32_t rows_of_block = kWarps / warps;
  const int64_t row_groups = ceil_div(rows.num_tokens, rows_of_block), grid_z = ceil_div(row_groups, kMaxGridX);
  const int64_t grid_x = ceil_div(row_groups, grid_z), grid_y = std::min(ceil_div(warps_of_row, warps), kMaxGridY);
  return {{static_cast<uint32_t>(grid_x), static_cast<uint32_t>(grid_y), static_cast<uint32_t>(grid_z)},
          {kLanes, warps, rows_of_block},
          aligned};
}

struct Place {
  int64_t position;     // of the token, in the order in which tokens get their noise
  uint32_t block;       // of columns: the thread's first one
  uint32_t to_next_go;  // distance to its next blocks, if the grid has too few threads for a whole row
};

template <class Element>
NEFT_FUNCTION Place place_of(Index grid, Index threads, Index block, Index thread) {
  const int64_t row_group = static_cast<int64_t>(block.z) * grid.x + block.x;
  const uint32_t warp_of_row = block.y * threads.y + thread.y;
  return {row_group * threads.z + thread.z, warp_of_row * kBlocksPerWarp<Element> + thread.x,
          grid.y * threads.y * kBlocksPerWarp<Element>};
}

template <class Element, NoiseKind kind, bool kAligned, class RowOf>
NEFT_FUNCTION void add_noise_to_rows(const Rows<RowOf>& rows, Place place) {
  using Block = ColumnBlock<Element>;
  using Bits = typename Block::Bits;
  constexpr int kBlocks = kBlocksPerThread<Element>;
  constexpr int64_t kStep = kLanes * Block::kColumns;  // columns from one block of the thread to the next
  if (place.position >= rows.num_tokens) return;

  const Key key = make_key(rows.seed ? *rows.seed : rows.seed_value);
  // The two tokens of the same noise are neighbours in this order. Their ids are usually equal, and the second one then finds
  // the row of the table in the cache.
  const bool symmetric = rows.half != 0, negated = symmetric && place.position % 2 != 0;
  const int64_t index = symmetric ? place.position / 2 : place.position;
  const int64_t token = negated ? index + rows.half : index, number = rows.first_token + index;
  const int64_t row = rows.row_of(token);
  const bool is_row = !RowOf::kMayBeNone || row >= 0;
  const float token_magnitude = rows.token_magnitude ? rows.token_magnitude[token] : rows.magnitude;
  const float magnitude = !is_row ? 0 : negated ? -token_magnitude : token_magnitude;
  const Bits* in_row = static_cast<const Bits*>(rows.in) + row * rows.row_stride;
  Bits* out_row = static_cast<Bits*>(rows.out) + token * rows.num_columns;
  const int64_t stride = kAligned ? 1 : rows.column_stride;

  for (uint32_t first = place.block; first < rows.num_blocks; first += place.to_next_go) {
    const int64_t column = static_cast<int64_t>(first) * Block::kColumns;
    const Bits* in = in_row + column * stride;
    Bits* out = out_row + column;

    Block blocks[kBlocks] = {};  // initialised, because some blocks are not loaded
    // The loops that load and store use `continue`, not `break`: each access is then a predicated instruction, not a branch.
    NEFT_UNROLL
    for (int k = 0; k < kBlocks; ++k) {
      if (!is_row || first + k * kLanes >= rows.num_blocks) continue;
      if (kAligned)
        blocks[k].load(in + k * kStep);
      else
        blocks[k].load(in + k * kStep * stride, rows.num_columns - column - k * kStep, stride);
    }
    // The magnitude is tested once, and `break` ends the loop at the first missing block. The compiler then computes once what
    // the Philox calls of a thread share: the keys of the rounds, and the products that do not depend on the block.
    if (magnitude != 0) {
      NEFT_UNROLL
      for (int k = 0; k < kBlocks; ++k) {
        if (first + k * kLanes >= rows.num_blocks) break;
        uint32_t words[4];
        set_counter(words, first + k * kLanes, number, rows.stream);
        philox4x32(words, key);
        blocks[k].template add_noise<kind>(magnitude, words);
      }
    } else if (!is_row) {
      for (Block& block : blocks) block.fill_with_nan();
    }
    NEFT_UNROLL
    for (int k = 0; k < kBlocks; ++k) {
      if (first + k * kLanes >= rows.num_blocks) continue;
      if (kAligned)
        blocks[k].store(out + k * kStep);
      else
        blocks[k].store(out + k * kStep, rows.num_columns - column - k * kStep);
    }
  }
}

}  // namespace neft
