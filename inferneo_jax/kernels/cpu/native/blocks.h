// What can be done with a block of 32 outputs, whatever its format. The functions of a format are
// compiled in sources of their own; this table is how the others reach them.
#pragma once

#include <cstdint>

namespace inferneo {

// What is known of a span, 64 values of a quantized row. Each half has a scale.
struct RowSpan {
  float scales[2];
  float scaled_sums[2];  // of a half's values, times its scale
  int32_t sums_of_16[4];
};

// Quantized rows of `spans` spans. Each span's values lie beside those of the same span of the other
// rows, `total` in all, so that a tile of rows is in few cache lines, and not all in the same sets.
struct QuantizedRows {
  const int8_t* data;
  const RowSpan* spans_of_rows;
  int64_t spans, total;

  QuantizedRows from(int64_t row) const {
    return {data + row * 64, spans_of_rows + row, spans, total};
  }
  const int8_t* values(int64_t row, int64_t span) const { return data + (span * total + row) * 64; }
  const RowSpan& about(int64_t row, int64_t span) const {
    return spans_of_rows[span * total + row];
  }
};

using Totals = float (*)[32];  // of each row, and each output of a block

struct BlockFormat {
  int64_t inputs, bytes;  // of a superblock

  // Multiplies the first `count` rows by a block.
  void (*multiply)(const uint8_t* block, const QuantizedRows& rows, int64_t count, Totals totals);

  // The weights of one output of a block; `to` has memory for whole spans.
  void (*take)(const uint8_t* block, int64_t spans, int64_t output, float* to);

  // Makes blocks of rows of a file: 32 for each block, null for padding.
  void (*encode)(const uint8_t* const* rows, int64_t blocks, int64_t row_bytes, uint8_t* to);
};

// The format with this number in kernels/cpu/linear.py.
const BlockFormat& block_format(int64_t number);

}  // namespace inferneo
