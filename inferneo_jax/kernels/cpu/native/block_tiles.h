// Products of quantized rows with a block of a format.
#pragma once

#include <algorithm>
#include <cstdint>

#include "block_formats.h"
#include "blocks.h"

namespace {
namespace quantized {

using inferneo::QuantizedRows;
using inferneo::Totals;

// Vectors of outputs, and rows, whose sums are kept in registers: there are 32 with AVX-512 and
// NEON, else 16.
#if defined(DOT_AVX512)
constexpr int kVectors = 2, kTileRows = 6;
#elif defined(DOT_AVX2)
constexpr int kVectors = 2, kTileRows = 3;
#elif defined(DOT_NEON)
constexpr int kVectors = 4, kTileRows = 2;
#else
constexpr int kVectors = 1, kTileRows = 1;
#endif
// Spans that are unpacked at a time: they stay in the first level of cache.
constexpr int64_t kUnpackedSpans = 4;

// A span of weights as they are multiplied.
template <int64_t kGroupInputs, int kMostOf, int kOffsetOf, bool kWithMinimum>
struct UnpackedSpan {
  static constexpr int64_t kInputs = kSpan, kGroup = kGroupInputs, kGroups = kSpan / kGroup;
  static constexpr int kMost = kMostOf, kOffset = kOffsetOf;
  static constexpr bool kMinimum = kWithMinimum, kUnpacked = true;
  Word values[kSpan / 4];
  float scales[kGroups][kBlock], minima[kMinimum ? kGroups : 1][kBlock];

  DotBytes quad(int64_t, int64_t i, int64_t output) const { return load_word(values[i], output); }
  DotFloats scale(int64_t, int64_t group, int64_t output) const {
    return load<DotFloats>(scales[group] + output);
  }
  DotFloats minimum(int64_t, int64_t group, int64_t output) const {
    return load<DotFloats>(minima[group] + output);
  }
};
template <class F>
using Unpacked = UnpackedSpan<F::kGroup, F::kMost, F::kOffset, F::kMinimum>;

template <class F>
using DotOf = Dot<F::kMost, F::kOffset>;

// A quad as an operand.
template <class F>
inline DotBytes operand(const F& weights, int64_t span, int64_t i, int64_t output) {
  const DotBytes quad = weights.quad(span, i, output);
  return F::kUnpacked ? quad : DotOf<F>::prepare(quad);
}

template <class F>
inline void unpack(const F& weights, int64_t span, Unpacked<F>& to) {
  for (int64_t output = 0; output < kBlock; output += kDotLanes) {
    for (int64_t i = 0; i < kSpan / 4; ++i) {
      store(to.values[i][output], operand(weights, span, i, output));
    }
    for (int64_t group = 0; group < kSpan / F::kGroup; ++group) {
      store(to.scales[group] + output, weights.scale(span, group, output));
      if constexpr (F::kMinimum) store(to.minima[group] + output, weights.minimum(span, group, output));
    }
  }
}

template <int kRows>
using Sums = DotFloats[kRows][kVectors];

// Adds the scaled products of kRows rows with a group of weights, and its minima times the sums of the
// rows' values.
template <class F, int kRows>
inline void add_group(const F& weights, int64_t span, int64_t group, int64_t output,
                      const QuantizedRows& rows, int64_t row_span, Sums<kRows>& sums) {
  constexpr int64_t kQuads = F::kGroup / 4;
  constexpr int64_t kChain = std::min<int64_t>(DotOf<F>::kChain, kQuads);
  const int8_t* const values = rows.values + row_span * kSpan;
  int32_t row_sums[kRows];
  UNROLL_DOT for (int r = 0; r < kRows; ++r) {
    const int32_t* const of_16 = rows.sums + (r * rows.spans + row_span) * (kSpan / 16);
    row_sums[r] = F::kGroup == 16 ? of_16[group] : of_16[2 * group] + of_16[2 * group + 1];
  }
  DotInts products[kRows][kVectors];
  UNROLL_DOT for (int64_t first = 0; first < kQuads; first += kChain) {
    typename DotOf<F>::Sums chains[kRows][kVectors];
    UNROLL_DOT for (int r = 0; r < kRows; ++r) {
      const int32_t correction = first ? 0 : F::kOffset * row_sums[r];
      UNROLL_DOT for (auto& vector : chains[r]) vector = DotOf<F>::start(correction);
    }
    UNROLL_DOT for (int64_t i = first; i < first + kChain; ++i) {
      const int64_t quad = group * kQuads + i;
      DotBytes w[kVectors];
      UNROLL_DOT for (int v = 0; v < kVectors; ++v) {
        w[v] = operand(weights, span, quad, output + v * kDotLanes);
      }
      UNROLL_DOT for (int r = 0; r < kRows; ++r) {
        const auto x = splat_four(values + r * rows.spans * kSpan + 4 * quad);
        UNROLL_DOT for (int v = 0; v < kVectors; ++v) DotOf<F>::add(chains[r][v], w[v], x);
      }
    }
    UNROLL_DOT for (int r = 0; r < kRows; ++r) {
      const int32_t correction = first ? 0 : F::kOffset * row_sums[r];
      UNROLL_DOT for (int v = 0; v < kVectors; ++v) {
        const DotInts some = DotOf<F>::finish(chains[r][v], correction);
        products[r][v] = first ? products[r][v] + some : some;
      }
    }
  }
  UNROLL_DOT for (int v = 0; v < kVectors; ++v) {
    const int64_t at = output + v * kDotLanes;
    const DotFloats scale = weights.scale(span, group, at);
    UNROLL_DOT for (int r = 0; r < kRows; ++r) {
      sums[r][v] = fused(to_floats(products[r][v]), scale, sums[r][v]);
    }
    if constexpr (F::kMinimum) {
      const DotFloats minimum = weights.minimum(span, group, at);
      UNROLL_DOT for (int r = 0; r < kRows; ++r) {
        const auto row_sum = splat<DotFloats>(static_cast<float>(row_sums[r]));
        sums[r][v] = fused(minimum, row_sum, sums[r][v]);
      }
    }
  }
}

// Adds the products of kRows rows with a span of weights to their totals. `span` is the span's number
// in the superblock, `row_span` in the rows.
//
// The products of a group are summed exactly, in integers. The sums of the span's groups are scaled
// and added up, and so are the minima times the row's sums; multiplied by the row's scale, they are
// added to the total. None of this depends on the other rows, or on the CPU.
template <class F, int kRows>
inline void add_span(const F& weights, int64_t span, const QuantizedRows& rows, int64_t row_span,
                     Totals totals) {
  constexpr int64_t kGroups = kSpan / F::kGroup;
  UNROLL_DOT for (int64_t output = 0; output < kBlock; output += kVectors * kDotLanes) {
    Sums<kRows> sums = {};
    if constexpr (F::kUnpacked) {
      // Nothing is gained from unrolling, and compiling it takes long.
      ROLLED for (int64_t group = 0; group < kGroups; ++group) {
        add_group<F, kRows>(weights, span, group, output, rows, row_span, sums);
      }
    } else {
      UNROLL_DOT for (int64_t group = 0; group < kGroups; ++group) {
        add_group<F, kRows>(weights, span, group, output, rows, row_span, sums);
      }
    }
    UNROLL_DOT for (int r = 0; r < kRows; ++r) {
      const auto scale = splat<DotFloats>(rows.scales[r * rows.spans + row_span]);
      UNROLL_DOT for (int v = 0; v < kVectors; ++v) {
        float* const total = totals[r] + output + v * kDotLanes;
        store(total, fused(sums[r][v], scale, load<DotFloats>(total)));
      }
    }
  }
}

// One row times a block, whose weights are multiplied as they are stored.
template <class F>
void multiply_one(const uint8_t* block, const QuantizedRows& row, Totals totals) {
  constexpr int64_t kSpans = F::kInputs / kSpan, kUnrolled = std::min<int64_t>(kSpans, 2);
  alignas(64) float sums[1][kBlock] = {};
  for (int64_t first = 0; first < row.spans; first += kSpans, block += sizeof(F)) {
    const F& weights = *reinterpret_cast<const F*>(block);
    ROLLED for (int64_t pair = 0; pair < kSpans; pair += kUnrolled) {
      // Whether a span's number is odd is known to the compiler.
      UNROLL_DOT for (int64_t odd = 0; odd < kUnrolled; ++odd) {
        add_span<F, 1>(weights, pair + odd, row, first + pair + odd, sums);
      }
    }
  }
  std::memcpy(totals, sums, sizeof sums);
}

template <class U, int kRows = 1>
inline void add_tile(int64_t count, const U* weights, int64_t spans, const QuantizedRows& rows,
                     int64_t first, Totals totals) {
  if (count == kRows) {
    for (int64_t span = 0; span < spans; ++span) {
      add_span<U, kRows>(weights[span], 0, rows, first + span, totals);
    }
  } else if constexpr (kRows < kTileRows) {
    add_tile<U, kRows + 1>(count, weights, spans, rows, first, totals);
  }
}

// Any number of rows. For several, weights are unpacked once; their tiles are of nearly equal size, as
// one of few rows costs more for each of them.
template <class F>
void multiply(const uint8_t* block, const QuantizedRows& rows, int64_t count, Totals totals) {
  if (count == 1) return multiply_one<F>(block, rows, totals);
  constexpr int64_t kSpans = F::kInputs / kSpan;
  static_assert(kUnpackedSpans % kSpans == 0, "superblocks are unpacked whole");
  const int64_t tiles = (count + kTileRows - 1) / kTileRows;
  alignas(64) Unpacked<F> unpacked[kUnpackedSpans];
  std::memset(totals, 0, count * sizeof *totals);
  for (int64_t first = 0; first < rows.spans; first += kUnpackedSpans) {
    const int64_t spans = std::min(kUnpackedSpans, rows.spans - first);
    for (int64_t span = 0; span < spans; ++span) {
      const F& weights = reinterpret_cast<const F*>(block)[(first + span) / kSpans];
      unpack(weights, (first + span) % kSpans, unpacked[span]);
    }
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t row = count * tile / tiles, end = count * (tile + 1) / tiles;
      add_tile(end - row, unpacked, spans, rows.from(row), first, totals + row);
    }
  }
}

template <class F>
void take(const uint8_t* block, int64_t spans, int64_t output, float* to) {
  constexpr int64_t kSpans = F::kInputs / kSpan;
  const int64_t vector = output / kDotLanes * kDotLanes, lane = output % kDotLanes;
  for (int64_t at = 0; at < spans; ++at, to += kSpan) {
    const F& weights = reinterpret_cast<const F*>(block)[at / kSpans];
    const int64_t span = at % kSpans;
    for (int64_t i = 0; i < kSpan / 4; ++i) {
      const int64_t group = 4 * i / F::kGroup;
      const DotBytes values = weights.quad(span, i, vector);
      const float scale = weights.scale(span, group, vector)[lane];
      for (int64_t k = 0; k < 4; ++k) {
        to[4 * i + k] = scale * static_cast<float>(values[4 * lane + k] - F::kOffset);
      }
      if constexpr (F::kMinimum) {
        const float minimum = weights.minimum(span, group, vector)[lane];
        for (int64_t k = 0; k < 4; ++k) to[4 * i + k] += minimum;
      }
    }
  }
}

template <class F>
void encode(const uint8_t* const* rows, int64_t blocks, int64_t row_bytes, uint8_t* to) {
  static constexpr uint8_t kZeros[F::kFileBytes] = {};
  constexpr int64_t kParts = F::kInputs / F::kFileInputs;
  const int64_t parts = row_bytes / F::kFileBytes;
  for (int64_t block = 0; block < blocks; ++block, rows += kBlock) {
    for (int64_t part = 0; part < parts; part += kParts, to += sizeof(F)) {
      F& superblock = *reinterpret_cast<F*>(to);
      for (int64_t output = 0; output < kBlock; ++output) {
        const uint8_t* const row = rows[output];
        for (int64_t i = 0; i < kParts; ++i) {
          const bool there = row && part + i < parts;
          superblock.encode(there ? row + (part + i) * F::kFileBytes : kZeros, i, output);
        }
      }
    }
  }
}

template <class F>
constexpr inferneo::BlockFormat kFunctions = {F::kInputs, sizeof(F), multiply<F>, take<F>,
                                              encode<F>};

}  // namespace quantized
}  // namespace
