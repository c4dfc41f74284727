// Matrices of floats or bfloat16 in blocks of 32 outputs, and products of a few rows with a block.
//
// A matrix is `[outputs / 32][inputs / kPack][32][kPack]` of numbers: all that a block needs is one
// stream of memory, in the order in which it is multiplied. Both are padded with zeros.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "pages.h"

namespace {
namespace dense {

using namespace wide;
using paged::BFloat16;
using paged::Float32;

constexpr int64_t kOutputs = 32;  // of a block

// Vectors of outputs, and rows, whose sums are kept in registers: of these there are 32 or 16.
constexpr int kVectors = 2;
constexpr int kSpan = kVectors * kLanes;
constexpr int kMostRows = kLanes == 16 ? 12 : 4;
// Rows are multiplied by so many, by twice or three times as many. Room for them is rounded up.
constexpr int kFewRows = 4;

constexpr int64_t round_up(int64_t size, int64_t multiple) {
  return (size + multiple - 1) / multiple * multiple;
}

// In pairs, as bfloat16 is kept; a float is a pack of its own.
template <class F>
constexpr int64_t whole_packs(int64_t inputs) {
  return round_up(inputs, F::kPack);
}

// One number as it lies in memory, and what it is multiplied as.
inline float widened(float x) { return x; }
inline float widened(uint16_t x) {
  const uint32_t bits = (uint32_t)x << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline void narrow(float x, float* to) { *to = x; }
inline void narrow(float x, uint16_t* to) { *to = paged::to_bfloat16(x); }

// kLanes numbers at once.
inline void put(Vector v, float* to) { store(to, v); }
inline void put(Vector v, uint16_t* to) {
#if defined(__AVX512BF16__) && defined(__AVX512F__)
  store(to, _mm512_cvtneps_pbh((__m512)v));
#else
  for (int i = 0; i < kLanes; ++i) to[i] = paged::to_bfloat16(v[i]);
#endif
}

// `size` numbers as operands of products, with zeros behind them up to whole packs.
template <class F, class X>
inline void put_operands(const X* __restrict from, int64_t size,
                         typename F::Operand* __restrict to) {
  if constexpr (std::is_same_v<X, typename F::Operand>) {
    std::memcpy(to, from, size * sizeof *to);
  } else {
    int64_t i = 0;
    if constexpr (std::is_same_v<X, float>) {
      for (; i + kLanes <= size; i += kLanes) put(load(from + i), to + i);
    }
    for (; i < size; ++i) narrow(widened(from[i]), to + i);
  }
  for (int64_t i = size; i < whole_packs<F>(size); ++i) to[i] = 0;
}

// kRows rows times one block; `totals[row][output]` are the sums. What a row gives depends neither
// on the others nor on their number.
template <class F, int kRows>
void multiply_rows(const typename F::Operand* x, int64_t stride, const typename F::Stored* block,
                   int64_t packs, float (*totals)[kOutputs]) {
  for (int64_t output = 0; output < kOutputs; output += kSpan) {
    const typename F::Stored* w = block + output * F::kPack;
    const typename F::Operand* from = x;
    Vector sums[kRows][kVectors] = {};
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

// The same for 1 to kMostRows rows; there is room for them rounded up to kFewRows.
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
