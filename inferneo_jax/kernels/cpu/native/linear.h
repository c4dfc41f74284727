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
#include "rows.h"
#include "vector.h"

namespace {

constexpr int64_t kBlock = 32;      // outputs
constexpr int64_t kTileRows = 6;    // most rows whose sums are kept in registers
constexpr int32_t kZeroPoint = 128;
constexpr int64_t kSharedQuantization = 8192;  // elements from which on it is shared out

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

// kCount rows times one block: `sums[row][output]`.
#if defined(__AVX512VNNI__)

template <int kCount>
inline void multiply_tile(const Matrix& matrix, int64_t block, const Rows& rows,
                          float (*sums)[kBlock]) {
  const int64_t inputs = matrix.inputs, group = matrix.group, groups = matrix.groups();
  const uint8_t* w = matrix.values + block * inputs * kBlock;
  const uint16_t* scales = matrix.scales + block * groups * kBlock;
  __m512 totals[kCount][2];
  for (int r = 0; r < kCount; ++r) totals[r][0] = totals[r][1] = _mm512_setzero_ps();
  for (int64_t g = 0; g < groups; ++g, scales += kBlock) {
    __m512i products[kCount][2];
    for (int r = 0; r < kCount; ++r) {
      products[r][0] = products[r][1] =
          _mm512_set1_epi32(-kZeroPoint * rows.sums[r * groups + g]);
    }
    const int8_t* x = rows.values + g * group;
    for (int64_t i = 0; i < group; i += 4, w += 4 * kBlock) {
      const __m512i low = _mm512_loadu_si512(w), high = _mm512_loadu_si512(w + 64);
      for (int r = 0; r < kCount; ++r) {
        int32_t four;
        std::memcpy(&four, x + r * inputs + i, 4);
        const __m512i input = _mm512_set1_epi32(four);
        products[r][0] = _mm512_dpbusd_epi32(products[r][0], low, input);
        products[r][1] = _mm512_dpbusd_epi32(products[r][1], high, input);
      }
    }
    const __m512 low = load_bfloat16(scales), high = load_bfloat16(scales + 16);
    for (int r = 0; r < kCount; ++r) {
      const __m512 scale = _mm512_set1_ps(rows.scales[r * groups + g]);
      totals[r][0] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products[r][0]),
                                     _mm512_mul_ps(scale, low), totals[r][0]);
      totals[r][1] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products[r][1]),
                                     _mm512_mul_ps(scale, high), totals[r][1]);
    }
  }
  for (int r = 0; r < kCount; ++r) {
    _mm512_storeu_ps(sums[r], totals[r][0]);
    _mm512_storeu_ps(sums[r] + 16, totals[r][1]);
  }
}

#else

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

#endif

using Tile = void (*)(const Matrix&, int64_t, const Rows&, float (*)[kBlock]);
constexpr Tile kTiles[] = {multiply_tile<1>, multiply_tile<2>, multiply_tile<3>,
                           multiply_tile<4>, multiply_tile<5>, multiply_tile<6>};

// What is done to rows before and after they are multiplied.
struct Around {
  enum Prologue : int64_t { kNone, kRmsNorm, kSwiGlu } prologue;
  const float* norm;      // of kRmsNorm: [width]
  float eps;
  const float* residual;  // is added: [rows, outputs], or null
};

// `out = residual + prologue(x) * matrix`.
//
// What the prologue gives has `width` columns, at most the matrix's inputs, which are padded to
// whole groups. `x` has as many, or twice as many for kSwiGlu: gates, then what they let through.
// `out` is `[rows, matrix.outputs]`.
inline void linear(xla::ffi::ThreadPool& pool, const Matrix& matrix, const Around& around,
                   const float* x, int64_t rows, int64_t width, float* out) {
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
    thread_local std::vector<float> buffer;
    buffer.resize(std::max<size_t>(buffer.size(), inputs));
    float* const y = buffer.data();
    if (around.prologue == Around::kRmsNorm) {
      rms_norm(x + row * width, width, around.norm, around.eps, y);
    } else if (around.prologue == Around::kSwiGlu) {
      const float* gate = x + 2 * row * width;
      swiglu(gate, gate + width, width, y);
    } else {
      std::copy_n(x + row * width, width, y);
    }
    std::fill(y + width, y + inputs, 0.0f);
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t first = g * matrix.group, place = row * groups + g;
      quantize_group(y + first, matrix.group, row_values + row * inputs + first,
                     row_scales + place, row_sums + place);
    }
  };
  if (rows * width < kSharedQuantization) {
    for (int64_t row = 0; row < rows; ++row) quantize(row);
  } else {
    share(pool, rows, quantize);
  }

  const int64_t blocks = (matrix.outputs + kBlock - 1) / kBlock;
  share(pool, blocks, [&](int64_t block) {
    const int64_t output = block * kBlock, size = std::min(kBlock, matrix.outputs - output);
    const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      // As even as can be: a tile of few rows is slower for each of them.
      const int64_t first = rows * tile / tiles, count = rows * (tile + 1) / tiles - first;
      float sums[kTileRows][kBlock];
      kTiles[count - 1](matrix, block,
                        {row_values + first * inputs, row_scales + first * groups,
                         row_sums + first * groups},
                        sums);
      for (int64_t r = 0; r < count; ++r) {
        const int64_t place = (first + r) * matrix.outputs + output;
        if (around.residual) {
          for (int64_t n = 0; n < size; ++n) sums[r][n] += around.residual[place + n];
        }
        std::copy_n(sums[r], size, out + place);
      }
    }
  });
}

}  // namespace
