// Products with matrices of int8 in groups along their inputs.
//
// A matrix of K inputs and N outputs is kept as unsigned bytes (value + 128) in blocks of 32
// outputs, `[N/32][K/4][32][4]`: one instruction multiplies 16 outputs by 4 inputs, and a block is
// one stream of memory. Each output has a scale for every group of inputs, bfloat16
// `[N/32][K/group][32]`.
//
// Rows are quantized on the way: symmetric int8 with a scale for each row and group. A group's
// products are summed exactly in int32; the zero point of the weights is undone by starting from
// -128 times the sum of the row's group. Then, group by group and in this order for every row
// however many there are, `sum += products * (row scale * output scale)` in float32: what a row
// gives does not depend on the others.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "pool.h"
#include "vector.h"

namespace {

constexpr int64_t kBlock = 32;      // outputs
constexpr int64_t kTileRows = 6;    // most rows whose sums are kept in registers
constexpr int32_t kZeroPoint = 128;

struct Matrix {
  const uint8_t* values;
  const uint16_t* scales;
  int64_t inputs, outputs, group;

  int64_t groups() const { return inputs / group; }
};

// Rows as they are multiplied: `inputs` values, `groups` scales and sums of each.
struct Rows {
  const int8_t* values;
  const float* scales;
  const int32_t* sums;
};

// One group of one row: its nearest multiples of `absmax / 127`, and that.
inline void quantize_group(const float* x, int64_t size, int8_t* values, float* scale,
                           int32_t* sum) {
  float most = 0;
  for (int64_t i = 0; i < size; ++i) most = std::max(most, std::fabs(x[i]));
  *scale = most / 127.0f;
  const float inverse = most > 0 ? 127.0f / most : 0.0f;
  int32_t total = 0;
  for (int64_t i = 0; i < size; ++i) {
    const int32_t value = static_cast<int32_t>(std::nearbyint(x[i] * inverse));
    values[i] = static_cast<int8_t>(value);
    total += value;
  }
  *sum = total;
}

// kCount rows times one block: `sums[row][output]`.
template <int kCount>
inline void multiply_tile(const Matrix& matrix, int64_t block, const Rows& rows,
                          float (*sums)[kBlock]) {
  const int64_t inputs = matrix.inputs, group = matrix.group, groups = matrix.groups();
  const uint8_t* values = matrix.values + block * inputs * kBlock;
  const uint16_t* scales = matrix.scales + block * groups * kBlock;
  for (int r = 0; r < kCount; ++r) std::fill_n(sums[r], kBlock, 0.0f);
  for (int64_t g = 0; g < groups; ++g, scales += kBlock) {
    for (int r = 0; r < kCount; ++r) {
      const int8_t* x = rows.values + r * inputs + g * group;
      int32_t products[kBlock];
      std::fill_n(products, kBlock, -kZeroPoint * rows.sums[r * groups + g]);
      const uint8_t* w = values + g * group * kBlock;
      for (int64_t i = 0; i < group; i += 4, w += 4 * kBlock) {
        for (int64_t n = 0; n < kBlock; ++n) {
          for (int64_t j = 0; j < 4; ++j) products[n] += int32_t{w[4 * n + j]} * x[i + j];
        }
      }
      const float row_scale = rows.scales[r * groups + g];
      for (int64_t n = 0; n < kBlock; ++n) {
        const float scale = row_scale * from_bfloat16(scales[n]);
        sums[r][n] += static_cast<float>(products[n]) * scale;
      }
    }
  }
}

using Tile = void (*)(const Matrix&, int64_t, const Rows&, float (*)[kBlock]);
constexpr Tile kTiles[] = {multiply_tile<1>, multiply_tile<2>, multiply_tile<3>,
                           multiply_tile<4>, multiply_tile<5>, multiply_tile<6>};

// `out = x * matrix`; `x` is `[rows, width]` where `width` may be less than the matrix's inputs,
// which are padded to whole groups; `out` is `[rows, matrix.outputs]`.
inline void linear(xla::ffi::ThreadPool& pool, const Matrix& matrix, const float* x, int64_t rows,
                   int64_t width, float* out) {
  const int64_t groups = matrix.groups(), inputs = matrix.inputs;
  // A thread's memory for this is kept from call to call.
  thread_local std::vector<int8_t> values;
  thread_local std::vector<float> scales;
  thread_local std::vector<int32_t> group_sums;
  values.resize(std::max<size_t>(values.size(), rows * inputs));
  scales.resize(std::max<size_t>(scales.size(), rows * groups));
  group_sums.resize(std::max<size_t>(group_sums.size(), rows * groups));
  int8_t* const row_values = values.data();
  float* const row_scales = scales.data();
  int32_t* const row_sums = group_sums.data();

  auto quantize = [&](int64_t row) {
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t first = g * matrix.group, size = std::min(matrix.group, width - first);
      int8_t* to = row_values + row * inputs + first;
      const int64_t place = row * groups + g;
      quantize_group(x + row * width + first, size, to, row_scales + place, row_sums + place);
      std::fill(to + size, to + matrix.group, 0);
    }
  };
  if (rows < 32) {
    for (int64_t row = 0; row < rows; ++row) quantize(row);
  } else {
    share(pool, rows, quantize);
  }

  const int64_t blocks = (matrix.outputs + kBlock - 1) / kBlock;
  share(pool, blocks, [&](int64_t block) {
    const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t first = rows * tile / tiles, count = rows * (tile + 1) / tiles - first;
      float sums[kTileRows][kBlock];
      kTiles[count - 1](matrix, block,
                        {row_values + first * inputs, row_scales + first * groups,
                         row_sums + first * groups},
                        sums);
      const int64_t output = block * kBlock;
      const int64_t size = std::min(kBlock, matrix.outputs - output);
      for (int64_t r = 0; r < count; ++r) {
        std::copy_n(sums[r], size, out + (first + r) * matrix.outputs + output);
      }
    }
  });
}

}  // namespace
