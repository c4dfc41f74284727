// Matrices of float32 or bfloat16 in blocks of 32 outputs, and products of a few rows with a block.
//
// A matrix is `[outputs / 32][inputs / kPack][32][kPack]` of numbers, so that a block is one stream of
// memory in the order in which it is multiplied. Outputs and inputs are padded with zeros.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "numbers.h"

namespace {
namespace dense {

using namespace simd;

constexpr int64_t kOutputs = 32;  // of a block

// Vectors of outputs, and rows, whose sums are kept in registers: there are 32 with AVX-512, else 16.
constexpr int kVectors = 2;
constexpr int kSpan = kVectors * kLanes;
constexpr int kMostRows = kLanes == 16 ? 12 : 4;
// Rows are multiplied 4, 8 or 12 at a time; their memory is rounded up to a multiple of 4.
constexpr int kFewRows = 4;

constexpr int64_t round_up(int64_t size, int64_t multiple) {
  return (size + multiple - 1) / multiple * multiple;
}

// Inputs with their padding: bfloat16 is stored in pairs.
template <class F>
constexpr int64_t whole_packs(int64_t inputs) {
  return round_up(inputs, F::kPack);
}

// Converts `size` numbers to operands, followed by zeros up to whole packs.
template <class F, class X>
inline void put_operands(const X* __restrict from, int64_t size,
                         typename F::Operand* __restrict to) {
  if constexpr (std::is_same_v<X, typename F::Operand>) {
    std::memcpy(to, from, size * sizeof *to);
  } else {
    int64_t i = 0;
    if constexpr (std::is_same_v<X, float>) {
      for (; i + kLanes <= size; i += kLanes) store_rounded(to + i, load(from + i));
    }
    for (; i < size; ++i) store_rounded(to + i, to_float(from[i]));
  }
  for (int64_t i = size; i < whole_packs<F>(size); ++i) to[i] = 0;
}

// kRows rows times one block; `totals[row][output]` are the results. A row's results depend neither on
// the other rows nor on their number.
template <class F, int kRows>
void multiply_rows(const typename F::Operand* x, int64_t stride, const typename F::Stored* block,
                   int64_t packs, float (*totals)[kOutputs]) {
  for (int64_t output = 0; output < kOutputs; output += kSpan) {
    const typename F::Stored* w = block + output * F::kPack;
    const typename F::Operand* from = x;
    Floats sums[kRows][kVectors] = {};
    for (int64_t pack = 0; pack < packs; ++pack, w += kOutputs * F::kPack, from += F::kPack) {
      typename F::Packed packed[kVectors];
      for (int v = 0; v < kVectors; ++v) packed[v] = F::read(w + v * kLanes * F::kPack);
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) {
        F::template multiply_add<kVectors>(sums[r], from + r * stride, packed);
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) store(totals[r] + output + v * kLanes, sums[r][v]);
    }
  }
}

// The same for 1 to kMostRows rows, with memory for them rounded up to a multiple of kFewRows.
template <class F>
inline void multiply_tile(int64_t rows, const typename F::Operand* x, int64_t stride,
                          const typename F::Stored* block, int64_t packs,
                          float (*totals)[kOutputs]) {
  if (rows <= kFewRows) {
    multiply_rows<F, kFewRows>(x, stride, block, packs, totals);
  } else if (rows <= 2 * kFewRows) {
    multiply_rows<F, std::min(2 * kFewRows, kMostRows)>(x, stride, block, packs, totals);
  } else {
    multiply_rows<F, kMostRows>(x, stride, block, packs, totals);
  }
}

}  // namespace dense
}  // namespace
