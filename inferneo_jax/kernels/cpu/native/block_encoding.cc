// Makes blocks of the rows of a file, or of floats. These functions are called with ctypes, not by
// XLA.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "block_formats.h"
#include "blocks.h"

namespace {
namespace quantized {

constexpr int64_t kGroup = Q8_0::kGroup;

// Inputs by outputs, as floats; zeros where the matrix ends.
using Tile = float[kGroup][kBlock];

// A matrix of floats: where a number is, is said in bytes.
struct FloatMatrix {
  enum Type : int64_t { kFloat32, kBFloat16, kFloat16 } type;
  const uint8_t* numbers;
  int64_t input_stride, output_stride, inputs, outputs;

  template <class Stored, class Widen>
  void read(int64_t input, int64_t output, Tile& to, const Widen& widen) const {
    const int64_t rows = std::min(kGroup, inputs - input), columns = std::min(kBlock, outputs - output);
    const auto number = [&](int64_t i, int64_t n) {
      Stored stored;
      std::memcpy(&stored, numbers + (input + i) * input_stride + (output + n) * output_stride,
                  sizeof stored);
      return widen(stored);
    };
    if (rows < kGroup || columns < kBlock) std::memset(to, 0, sizeof to);
    // The inner loop follows memory.
    if (output_stride < input_stride) {
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t n = 0; n < columns; ++n) to[i][n] = number(i, n);
      }
    } else {
      for (int64_t n = 0; n < columns; ++n) {
        for (int64_t i = 0; i < rows; ++i) to[i][n] = number(i, n);
      }
    }
  }

  void read(int64_t input, int64_t output, Tile& to) const {
    if (type == kFloat32) read<float>(input, output, to, [](float x) { return x; });
    if (type == kBFloat16) read<uint16_t>(input, output, to, from_bfloat16);
    if (type == kFloat16) read<uint16_t>(input, output, to, from_float16);
  }
};

// Rounds a group to multiples of its outputs' scales, `absmax / 127` as float16.
inline void round_group(const Tile& from, int64_t group, Q8_0& to) {
  float scales[kBlock] = {};
  for (const auto& input : from) {
    for (int64_t n = 0; n < kBlock; ++n) {
      const float size = std::fabs(input[n]);
      scales[n] = size < scales[n] ? scales[n] : size;  // NaN is above all
    }
  }
  for (int64_t n = 0; n < kBlock; ++n) {
    to.scales[group][n] = to_float16(scales[n] / 127.0f);
    scales[n] = std::max(from_float16(to.scales[group][n]), 1e-30f);
  }
  for (int64_t i = 0; i < kGroup; i += 4) {
    uint32_t words[kBlock] = {};
    for (int64_t k = 0; k < 4; ++k) {
      for (int64_t n = 0; n < kBlock; ++n) {
        // If the scale was rounded down, the largest value is above 127. Adding 1.5 * 2^23 rounds.
        float value = from[i + k][n] / scales[n];
        value = value < 127.0f ? value : 127.0f;
        value = (value > -127.0f ? value : -127.0f) + 12582912.0f;
        uint32_t bits;
        std::memcpy(&bits, &value, sizeof bits);
        words[n] |= (bits - 0x4b400000 + 128) << 8 * k;
      }
    }
    std::memcpy(to.values[group * 8 + i / 4], words, sizeof words);
  }
}

}  // namespace quantized
}  // namespace

// The blocks of rows in a format of ggml: 32 rows for each block, null for padding.
extern "C" void encode_rows(int64_t format, const uint8_t* const* rows, int64_t blocks,
                            int64_t row_bytes, uint8_t* to) {
  inferneo::block_format(format).encode(rows, blocks, row_bytes, to);
}

// Blocks of Q8_0 of the floats that are nearest.
extern "C" void encode_floats(int64_t type, const uint8_t* numbers, int64_t input_stride,
                              int64_t output_stride, int64_t inputs, int64_t outputs, uint8_t* to) {
  using namespace quantized;
  const FloatMatrix matrix{static_cast<FloatMatrix::Type>(type), numbers, input_stride, output_stride,
                           inputs, outputs};
  alignas(64) Tile tile;
  for (int64_t output = 0; output < outputs; output += kBlock) {
    for (int64_t input = 0; input < inputs; input += kSpan, to += sizeof(Q8_0)) {
      Q8_0& block = *reinterpret_cast<Q8_0*>(to);
      for (int64_t group = 0; group < kSpan / kGroup; ++group) {
        matrix.read(input + group * kGroup, output, tile);
        round_group(tile, group, block);
      }
    }
  }
}
