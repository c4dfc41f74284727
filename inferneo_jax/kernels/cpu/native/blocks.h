// What can be done with a block of 32 outputs, whatever its format. The functions of a format are
// compiled in sources of their own; this table is how the others reach them.
#pragma once

#include <cstdint>

namespace inferneo {

// Quantized rows, one after the other. Each has values, a scale for each span of 64, and the sum of
// each 16 values.
struct QuantizedRows {
  const int8_t* values;
  const float* scales;
  const int32_t* sums;
  int64_t spans;

  QuantizedRows from(int64_t row) const {
    return {values + row * spans * 64, scales + row * spans, sums + row * spans * 4, spans};
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
