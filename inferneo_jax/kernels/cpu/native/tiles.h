// Matrices in groups of 32 inputs, and products of a few quantized rows with 32 outputs.
//
// A matrix is `[outputs / 32][inputs / 32]` of the groups below: all that a block of 32 outputs
// needs is one stream of memory. Within a group the values of 4 inputs lie together for each
// output, as one instruction multiplies them.
#pragma once

#include <cstdint>

#include "lanes.h"

namespace {

constexpr int64_t kBlock = 32;  // outputs
constexpr int64_t kGroup = 32;  // inputs that share a scale of the weights
constexpr int64_t kSpan = 64;   // inputs that share a scale of a row: two groups

// weight = scale * (value - 128): ggml's Q8_0 but for the 128.
struct Bits8 {
  uint16_t scales[kBlock];  // float16
  uint8_t values[kGroup / 4][kBlock][4];
};

// weight = scale * value + minimum: ggml's Q4_1. The low four bits are those of the first 16
// outputs, the high ones of the others.
struct Bits4 {
  uint16_t scales[kBlock];
  uint16_t minima[kBlock];
  uint8_t values[kGroup / 4][kBlock / 2][4];
};

// Quantized rows: `inputs` values, a scale for each span, the sum of the values for each group.
struct Rows {
  const int8_t* values;
  const float* scales;
  const int32_t* sums;
  int64_t inputs;
};

// What one vector of outputs of a group needs: its weights' bytes, start, step and share in a sum.
template <typename Group>
struct Of;

template <>
struct Of<Bits8> {
  static Bytes load(const Bits8& group, int64_t i, int64_t output) {
    return load_bytes(group.values[i][output]);
  }
  static Ints start(int32_t sum) { return centred_start(sum); }
  template <typename X>
  static Ints step(const Ints& sums, const Bytes& w, const X& x) {
    return centred_dot(sums, w, x);
  }
};

template <>
struct Of<Bits4> {
  static Bytes load(const Bits4& group, int64_t i, int64_t output) {
    const Bytes both = load_bytes(group.values[i][output % (kBlock / 2)]);
    return output < kBlock / 2 ? low_nibbles(both) : high_nibbles(both);
  }
  static Ints start(int32_t) { return zeros(); }
  template <typename X>
  static Ints step(const Ints& sums, const Bytes& w, const X& x) {
    return dot(sums, w, x);
  }
};

// kCount rows times one block; `totals[row][output]` are the sums.
//
// The products of a group are summed exactly, in int32. What follows is the same for a row
// whatever rows are beside it: those of a span's two groups are scaled and added up, and so are
// their minima times the row's sums; times the row's scale they join the total.
template <typename Group, int kCount>
inline void multiply_tile(const Group* groups, int64_t spans, const Rows& rows,
                          float (*totals)[kBlock]) {
  constexpr int kVectors = 2;
  for (int64_t output = 0; output < kBlock; output += kVectors * kWidth) {
    Floats total[kCount][kVectors];
    for (auto& row : total) {
      for (auto& vector : row) vector = splat(0.0f);
    }
    for (int64_t span = 0; span < spans; ++span) {
      Floats sum[kCount][kVectors];
      for (int64_t half = 0; half < 2; ++half) {
        const Group& group = groups[2 * span + half];
        const int8_t* x = rows.values + span * kSpan + half * kGroup;
        Ints products[kCount][kVectors];
        for (int r = 0; r < kCount; ++r) {
          const int32_t row_sum = rows.sums[(r * spans + span) * 2 + half];
          for (auto& vector : products[r]) vector = Of<Group>::start(row_sum);
        }
        for (int64_t i = 0; i < kGroup / 4; ++i) {
          Bytes w[kVectors];
          for (int v = 0; v < kVectors; ++v) {
            w[v] = Of<Group>::load(group, i, output + v * kWidth);
          }
          for (int r = 0; r < kCount; ++r) {
            const auto four = splat_four(x + r * rows.inputs + 4 * i);
            for (int v = 0; v < kVectors; ++v) {
              products[r][v] = Of<Group>::step(products[r][v], w[v], four);
            }
          }
        }
        for (int v = 0; v < kVectors; ++v) {
          const Floats scale = load_halves(group.scales + output + v * kWidth);
          for (int r = 0; r < kCount; ++r) {
            const Floats product = to_floats(products[r][v]);
            sum[r][v] = half ? multiply_add(product, scale, sum[r][v]) : multiply(product, scale);
          }
          if constexpr (sizeof(Group) == sizeof(Bits4)) {
            const Floats minimum = load_halves(group.minima + output + v * kWidth);
            for (int r = 0; r < kCount; ++r) {
              const int32_t row_sum = rows.sums[(r * spans + span) * 2 + half];
              sum[r][v] = multiply_add(minimum, splat(static_cast<float>(row_sum)), sum[r][v]);
            }
          }
        }
      }
      for (int r = 0; r < kCount; ++r) {
        const Floats scale = splat(rows.scales[r * spans + span]);
        for (int v = 0; v < kVectors; ++v) {
          total[r][v] = multiply_add(sum[r][v], scale, total[r][v]);
        }
      }
    }
    for (int r = 0; r < kCount; ++r) {
      for (int v = 0; v < kVectors; ++v) store(totals[r] + output + v * kWidth, total[r][v]);
    }
  }
}

}  // namespace
