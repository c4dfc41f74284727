// Matrices of 8-bit or 4-bit integers, and products of a few quantized rows with 32 outputs.
//
// A matrix is `[outputs / 32][inputs / 32]` of the groups below, so that a block of 32 outputs is
// one stream of memory. In a group, the values of 4 inputs lie side by side for each output, as one
// instruction multiplies them.
#pragma once

#include <cstdint>
#include <type_traits>

#include "simd.h"

namespace {
namespace quantized {

using namespace simd;

constexpr int64_t kBlock = 32;  // outputs
constexpr int64_t kGroup = 32;  // inputs that share a scale of the weights
constexpr int64_t kSpan = 64;   // inputs that share a scale of a row: two groups

// weight = scale * (value - 128): ggml's Q8_0, with 128 added to its values.
//
// Of both formats, load() reads the weights of 4 inputs and kDotLanes outputs, start() is where sums
// of their products with a row begin, whose values add up to `row_sum`, and add() adds to them.
struct Bits8 {
  uint16_t scales[kBlock];  // float16
  uint8_t values[kGroup / 4][kBlock][4];

  DotBytes load(int64_t i, int64_t output) const { return simd::load<DotBytes>(values[i][output]); }
  static DotInts start(int32_t row_sum) { return centred_start(row_sum); }
  static DotInts add(const DotInts& sums, const DotBytes& w, const DotInts& x) {
    return centred_dot(sums, w, x);
  }
};

// weight = scale * value + minimum: ggml's Q4_1. The low four bits belong to the first 16 outputs,
// the high four to the others.
struct Bits4 {
  uint16_t scales[kBlock];
  uint16_t minima[kBlock];
  uint8_t values[kGroup / 4][kBlock / 2][4];

  DotBytes load(int64_t i, int64_t output) const {
    const auto both = simd::load<DotBytes>(values[i][output % (kBlock / 2)]);
    return output < kBlock / 2 ? both & 15 : both >> 4;
  }
  static DotInts start(int32_t) { return DotInts{}; }
  static DotInts add(const DotInts& sums, const DotBytes& w, const DotInts& x) {
    return dot(sums, w, x);
  }
};

// Quantized rows. Each has `inputs` values, a scale for each span, and the sum of each group's values.
struct Rows {
  const int8_t* values;
  const float* scales;
  const int32_t* sums;
  int64_t inputs;
};

// kCount rows times one block; `totals[row][output]` are the results.
//
// The products of a group are summed exactly, in int32. The sums of a span's two groups are scaled
// and added up, and so are their minima times the row's sums; multiplied by the row's scale, they
// are added to the total. None of this depends on the other rows.
template <typename Group, int kCount>
inline void multiply_tile(const Group* groups, int64_t spans, const Rows& rows,
                          float (*totals)[kBlock]) {
  constexpr int kVectors = 2;
  for (int64_t output = 0; output < kBlock; output += kVectors * kDotLanes) {
    DotFloats total[kCount][kVectors];
    for (auto& row : total) {
      for (auto& vector : row) vector = DotFloats{};
    }
    for (int64_t span = 0; span < spans; ++span) {
      DotFloats sum[kCount][kVectors];
      for (int64_t half = 0; half < 2; ++half) {
        const Group& group = groups[2 * span + half];
        const int8_t* x = rows.values + span * kSpan + half * kGroup;
        DotInts products[kCount][kVectors];
        for (int r = 0; r < kCount; ++r) {
          const int32_t row_sum = rows.sums[(r * spans + span) * 2 + half];
          for (auto& vector : products[r]) vector = Group::start(row_sum);
        }
        for (int64_t i = 0; i < kGroup / 4; ++i) {
          DotBytes w[kVectors];
          for (int v = 0; v < kVectors; ++v) {
            w[v] = group.load(i, output + v * kDotLanes);
          }
          for (int r = 0; r < kCount; ++r) {
            const auto four = splat_four(x + r * rows.inputs + 4 * i);
            for (int v = 0; v < kVectors; ++v) {
              products[r][v] = Group::add(products[r][v], w[v], four);
            }
          }
        }
        for (int v = 0; v < kVectors; ++v) {
          const DotFloats scale = load_float16(group.scales + output + v * kDotLanes);
          for (int r = 0; r < kCount; ++r) {
            const DotFloats product = to_floats(products[r][v]);
            sum[r][v] = half ? fma(product, scale, sum[r][v]) : product * scale;
          }
          if constexpr (std::is_same_v<Group, Bits4>) {
            const DotFloats minimum = load_float16(group.minima + output + v * kDotLanes);
            for (int r = 0; r < kCount; ++r) {
              const int32_t row_sum = rows.sums[(r * spans + span) * 2 + half];
              sum[r][v] = fma(minimum, splat<DotFloats>(static_cast<float>(row_sum)), sum[r][v]);
            }
          }
        }
      }
      for (int r = 0; r < kCount; ++r) {
        const DotFloats scale = splat<DotFloats>(rows.scales[r * spans + span]);
        for (int v = 0; v < kVectors; ++v) {
          total[r][v] = fma(sum[r][v], scale, total[r][v]);
        }
      }
    }
    for (int r = 0; r < kCount; ++r) {
      for (int v = 0; v < kVectors; ++v) store(totals[r] + output + v * kDotLanes, total[r][v]);
    }
  }
}

}  // namespace quantized
}  // namespace
