// Products of quantized rows with a block of a format.
#pragma once

#include <algorithm>
#include <cstdint>

#include "amx.h"
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
// Bytes between what is multiplied and what is requested from memory, for one row and for several.
constexpr int64_t kReadAhead = 4096, kReadFurtherAhead = 6144;

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

// With `centred`, values are signed and their offset is subtracted.
template <class F>
inline void unpack(const F& weights, int64_t span, bool centred, Unpacked<F>& to) {
  for (int64_t output = 0; output < kBlock; output += kDotLanes) {
    UNROLL_DOT for (int64_t half = 0; half < kSpan / 4; half += 8) {
      UNROLL_DOT for (int64_t i = half; i < half + 8; ++i) {
        const DotBytes quad = operand(weights, span, i, output);
        store(to.values[i][output], centred ? quad - static_cast<uint8_t>(F::kOffset) : quad);
      }
    }
    for (int64_t group = 0; group < kSpan / F::kGroup; ++group) {
      store(to.scales[group] + output, weights.scale(span, group, output));
      if constexpr (F::kMinimum) store(to.minima[group] + output, weights.minimum(span, group, output));
    }
  }
}

// What is subtracted from a row's products with the values of a group.
template <class F>
inline int32_t correction(const inferneo::RowSpan& row, int64_t group) {
  const int32_t* const sums = row.sums_of_16;
  return F::kOffset * (F::kGroup == 16 ? sums[group] : sums[2 * group] + sums[2 * group + 1]);
}

// The scale of a row's values in a group.
template <class F>
inline float scale_of_group(const inferneo::RowSpan& row, int64_t group) {
  return row.scales[group * F::kGroup / 32];
}

// The sum of a row's values in a group, times their scale.
template <class F>
inline DotFloats sum_of_group(const inferneo::RowSpan& row, int64_t group) {
  if (F::kGroup == 32) return splat<DotFloats>(row.scaled_sums[group]);
  return splat<DotFloats>(static_cast<float>(row.sums_of_16[group]) * row.scales[group / 2]);
}

template <int kRows>
using Sums = DotFloats[kRows][kVectors];

// Adds to sums the scaled products of kRows rows with a group of weights, and its minima times the sums
// of the rows' values.
template <class F, int kRows>
inline void add_group(const F& weights, int64_t span, int64_t group, int64_t output,
                      const QuantizedRows& rows, int64_t row_span, Sums<kRows>& sums) {
  constexpr int64_t kQuads = F::kGroup / 4;
  constexpr int64_t kChain = std::min<int64_t>(DotOf<F>::kChain, kQuads);
  int32_t corrections[kRows];
  UNROLL_DOT for (int r = 0; r < kRows; ++r) {
    corrections[r] = correction<F>(rows.about(r, row_span), group);
  }
  DotInts products[kRows][kVectors];
  UNROLL_DOT for (int64_t first = 0; first < kQuads; first += kChain) {
    typename DotOf<F>::Sums chains[kRows][kVectors];
    UNROLL_DOT for (int r = 0; r < kRows; ++r) {
      UNROLL_DOT for (auto& chain : chains[r]) chain = DotOf<F>::start(first ? 0 : corrections[r]);
    }
    UNROLL_DOT for (int64_t i = first; i < first + kChain; ++i) {
      const int64_t quad = group * kQuads + i;
      DotBytes w[kVectors];
      UNROLL_DOT for (int v = 0; v < kVectors; ++v) {
        w[v] = operand(weights, span, quad, output + v * kDotLanes);
      }
      UNROLL_DOT for (int r = 0; r < kRows; ++r) {
        const auto x = splat_four(rows.values(r, row_span) + 4 * quad);
        UNROLL_DOT for (int v = 0; v < kVectors; ++v) DotOf<F>::add(chains[r][v], w[v], x);
      }
    }
    UNROLL_DOT for (int r = 0; r < kRows; ++r) {
      UNROLL_DOT for (int v = 0; v < kVectors; ++v) {
        const DotInts some = DotOf<F>::finish(chains[r][v], first ? 0 : corrections[r]);
        products[r][v] = first ? products[r][v] + some : some;
      }
    }
  }
  UNROLL_DOT for (int v = 0; v < kVectors; ++v) {
    const int64_t at = output + v * kDotLanes;
    const DotFloats scale = weights.scale(span, group, at);
    UNROLL_DOT for (int r = 0; r < kRows; ++r) {
      const auto row_scale = splat<DotFloats>(scale_of_group<F>(rows.about(r, row_span), group));
      sums[r][v] = fused(to_floats(products[r][v]), scale * row_scale, sums[r][v]);
    }
    if constexpr (F::kMinimum) {
      const DotFloats minimum = weights.minimum(span, group, at);
      UNROLL_DOT for (int r = 0; r < kRows; ++r) {
        sums[r][v] = fused(minimum, sum_of_group<F>(rows.about(r, row_span), group), sums[r][v]);
      }
    }
  }
}

// Adds the products of kRows rows with a span of weights to their totals. `span` is the span's number
// in the superblock, `row_span` in the rows.
//
// The products of a group are summed exactly, in integers. Their sum, times the scales of the group and
// of the row's values, is added to the total, and so is the minimum times the sum of these values. None
// of this depends on the other rows, or on the CPU.
template <class F, int kRows>
inline void add_span(const F& weights, int64_t span, const QuantizedRows& rows, int64_t row_span,
                     Totals totals) {
  constexpr int64_t kGroups = kSpan / F::kGroup;
  UNROLL_DOT for (int64_t output = 0; output < kBlock; output += kVectors * kDotLanes) {
    Sums<kRows> sums;
    UNROLL_DOT for (int r = 0; r < kRows; ++r) {
      UNROLL_DOT for (int v = 0; v < kVectors; ++v) {
        sums[r][v] = load<DotFloats>(totals[r] + output + v * kDotLanes);
      }
    }
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
      UNROLL_DOT for (int v = 0; v < kVectors; ++v) {
        store(totals[r] + output + v * kDotLanes, sums[r][v]);
      }
    }
  }
}

// Requests what follows a superblock from memory, or one of kParts equal parts of that. A core waits
// when it has requested a few dozen lines, so what takes long to multiply is requested in parts.
template <int64_t kParts = 1, class F>
inline void read_ahead(const F& weights, int64_t distance, int64_t part = 0) {
  constexpr int64_t kLines = (sizeof(F) + 64 * kParts - 1) / (64 * kParts);
  const auto* const from = reinterpret_cast<const uint8_t*>(&weights) + distance + part * kLines * 64;
  for (int64_t line = 0; line < kLines; ++line) prefetch(from + line * 64);
}

// One row times a block, whose weights are multiplied as they are stored.
template <class F>
void multiply_one(const uint8_t* block, const QuantizedRows& row, Totals totals) {
  constexpr int64_t kSpans = F::kInputs / kSpan, kUnrolled = std::min<int64_t>(kSpans, 2);
  alignas(64) float sums[1][kBlock] = {};
  for (int64_t first = 0; first < row.spans; first += kSpans, block += sizeof(F)) {
    const F& weights = *reinterpret_cast<const F*>(block);
    read_ahead(weights, kReadAhead);
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
inline void add_tile(int64_t count, const U& weights, const QuantizedRows& rows, int64_t row_span,
                     Totals totals) {
  if (count == kRows) {
    add_span<U, kRows>(weights, 0, rows, row_span, totals);
  } else if constexpr (kRows < kTileRows) {
    add_tile<U, kRows + 1>(count, weights, rows, row_span, totals);
  }
}

#if defined(DOT_AMX)
// As many rows or more are multiplied by AMX. What it takes does not depend on the inputs of a group.
template <class F>
constexpr int64_t kAmxRows = F::kGroup == 16 ? 24 : 8;

// Products of a tile of rows with the groups of a span, in integers.
template <class U>
using Products = int32_t[kSpan / U::kGroup][amx::kRows][kBlock];

template <class U>
inline void multiply_span(const U& weights, const QuantizedRows& rows, int64_t row_span,
                          Products<U>& products) {
  for (int64_t group = 0; group < kSpan / U::kGroup; group += 2) {
    const int64_t input = group * U::kGroup;
    amx::multiply(rows.values(0, row_span) + input, kSpan, U::kGroup, weights.values[input / 4][0],
                  products + group);
  }
}

// Adds products to the totals of rows from `begin` to `end`, in the order of add_span().
template <class U>
inline void add_products(const U& weights, const QuantizedRows& rows, int64_t row_span,
                         const Products<U>& products, int64_t begin, int64_t end, Totals totals) {
  constexpr int kGroups = kSpan / U::kGroup, kVectors = kBlock / 16;
  DotFloats scales[kGroups][kVectors], minima[kGroups][kVectors];
  UNROLL for (int group = 0; group < kGroups; ++group) {
    UNROLL for (int v = 0; v < kVectors; ++v) {
      scales[group][v] = weights.scale(0, group, v * 16);
      if constexpr (U::kMinimum) minima[group][v] = weights.minimum(0, group, v * 16);
    }
  }
  ROLLED for (int64_t r = begin; r < end; ++r) {
    DotFloats sums[kVectors];
    UNROLL for (int v = 0; v < kVectors; ++v) sums[v] = load<DotFloats>(totals[r] + v * 16);
    UNROLL for (int group = 0; group < kGroups; ++group) {
      const auto row_scale = splat<DotFloats>(scale_of_group<U>(rows.about(r, row_span), group));
      UNROLL for (int v = 0; v < kVectors; ++v) {
        const DotFloats product = to_floats(load<DotInts>(&products[group][r][v * 16]));
        sums[v] = fused(product, scales[group][v] * row_scale, sums[v]);
      }
      if constexpr (U::kMinimum) {
        const DotFloats sum = sum_of_group<U>(rows.about(r, row_span), group);
        UNROLL for (int v = 0; v < kVectors; ++v) sums[v] = fused(minima[group][v], sum, sums[v]);
      }
    }
    UNROLL for (int v = 0; v < kVectors; ++v) store(totals[r] + v * 16, sums[v]);
  }
}

// Adds the products of `count` rows with a span of centred weights, by tiles of `tile` rows.
template <class U>
void add_tiles(const U& weights, const QuantizedRows& rows, int64_t row_span, int64_t count,
               int64_t tile, Totals totals) {
  alignas(64) Products<U> products;
  for (int64_t row = 0; row < count; row += tile) {
    // The last tile ends with the last row, and begins among those before it.
    const int64_t from = std::min(row, count - tile);
    multiply_span(weights, rows.from(from), row_span, products);
    add_products(weights, rows.from(from), row_span, products, row - from, tile, totals + from);
  }
}
#endif

// Any number of rows. For several, each span of weights is unpacked once; tiles of rows are of nearly
// equal size, as one of few rows costs more for each of them.
template <class F>
void multiply(const uint8_t* block, const QuantizedRows& rows, int64_t count, Totals totals) {
  if (count == 1) return multiply_one<F>(block, rows, totals);
  std::memset(totals, 0, count * sizeof *totals);
  const auto for_spans = [&](bool centred, const auto& each) {
    constexpr int64_t kSpans = F::kInputs / kSpan;
    for (int64_t span = 0; span < rows.spans; ++span) {
      const F& weights = reinterpret_cast<const F*>(block)[span / kSpans];
      read_ahead<kSpans>(weights, kReadFurtherAhead, span % kSpans);
      alignas(64) Unpacked<F> unpacked;
      unpack(weights, span % kSpans, centred, unpacked);
      each(unpacked, span);
    }
  };
#if defined(DOT_AMX)
  if (count >= kAmxRows<F> && amx::allowed()) {
    const int64_t parts = (count + amx::kRows - 1) / amx::kRows, tile = (count + parts - 1) / parts;
    const amx::Tiles tiles(amx::Shape(tile, F::kGroup));
    return for_spans(true, [&](const auto& weights, int64_t span) {
      add_tiles(weights, rows, span, count, tile, totals);
    });
  }
#endif
  const int64_t tiles = (count + kTileRows - 1) / kTileRows;
  for_spans(false, [&](const auto& weights, int64_t span) {
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t row = count * tile / tiles, end = count * (tile + 1) / tiles;
      add_tile(end - row, weights, rows.from(row), span, totals + row);
    }
  });
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
