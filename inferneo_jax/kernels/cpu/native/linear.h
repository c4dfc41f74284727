// Products with matrices of int8 or 4 bits: rows are quantized on the way, work is shared out.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "pool.h"
#include "rows.h"
#include "tiles.h"

namespace {

// Rows whose sums are kept in registers, of which there are 32 or 16.
constexpr int64_t kTileRows = kWidth == 16 ? 5 : 3;
// Rows that are multiplied with a block while it is near: their values fill half of an L2 cache.
constexpr int64_t kNearRows = 256;
// Elements from which on quantizing is shared out.
constexpr int64_t kSharedQuantization = 8192;
// Rows that a thread quantizes at a time then.
constexpr int64_t kQuantizedAtOnce = 4;

template <typename Group>
struct Matrix {
  const Group* groups;
  int64_t inputs, outputs;  // inputs: of whole spans; outputs: those that are wanted

  int64_t spans() const { return inputs / kSpan; }
  int64_t blocks() const { return (outputs + kBlock - 1) / kBlock; }
};

// What is done to rows before and after they are multiplied.
struct Around {
  enum Prologue : int64_t { kNone, kRmsNorm, kSwiGlu } prologue;
  const float* norm;  // of kRmsNorm: [width]
  float eps;
  const float* residual;  // is added: [rows, outputs], or null
};

// Where quantized rows are put: as `Rows`, which are read from here.
struct QuantizedRows {
  int8_t* values;
  float* scales;
  int32_t* sums;
  int64_t inputs;

  Rows from(int64_t row) const {
    return {values + row * inputs, scales + row * inputs / kSpan, sums + row * inputs / kGroup,
            inputs};
  }
  void put(int64_t row, int64_t span, const Floats16 (&x)[kSpan / kStride]) const {
    const int64_t at = row * inputs / kSpan + span;
    quantize_span<kSpan, kGroup>(x, values + at * kSpan, scales + at, sums + at * (kSpan / kGroup));
  }
};

// Memory of a thread for quantized rows, kept from call to call.
class Quantized {
 public:
  QuantizedRows reserve(int64_t rows, int64_t inputs) {
    grow(values_, rows * inputs);
    grow(scales_, rows * inputs / kSpan);
    grow(sums_, rows * inputs / kGroup);
    return {values_.data(), scales_.data(), sums_.data(), inputs};
  }

 private:
  template <typename T>
  static void grow(std::vector<T>& kept, size_t size) {
    if (kept.size() < size) kept.resize(size);
  }
  std::vector<int8_t> values_;
  std::vector<float> scales_;
  std::vector<int32_t> sums_;
};

// One row of `x`, by way of the prologue, as row number `row` of what is quantized. What it gives
// has `width` columns, and zeros behind them up to the inputs.
inline void quantize_row(const Around& around, const float* x, int64_t row, int64_t width,
                         const QuantizedRows& to) {
  const auto prologue = around.prologue;
  x += row * width * (prologue == Around::kSwiGlu ? 2 : 1);
  const float factor = prologue == Around::kRmsNorm ? rms_factor(x, width, around.eps) : 1.0f;
  for (int64_t first = 0; first < to.inputs; first += kSpan) {
    Floats16 span[kSpan / kStride];
    UNROLL for (int64_t i = 0; i < kSpan / kStride; ++i) {
      const int64_t at = first + i * kStride;
      auto load = [=](const float* from, Floats16& some) {
        at + kStride <= width ? load16(from + at, some) : load_some(from + at, width - at, some);
      };
      Floats16 other;
      load(x, span[i]);
      if (prologue == Around::kRmsNorm) {
        load(around.norm, other);
        span[i] = span[i] * factor * other;
      } else if (prologue == Around::kSwiGlu) {
        load(x + width, other);
        swiglu(span[i], other, span[i]);
      }
    }
    to.put(row, first / kSpan, span);
  }
}

// Rows from `first` on times one block of outputs, into `out`.
template <typename Group, int kCount>
inline void multiply_rows(const Matrix<Group>& matrix, int64_t block, const Rows& rows,
                          int64_t first, const float* residual, float* out) {
  float totals[kCount][kBlock];
  multiply_tile<Group, kCount>(matrix.groups + block * matrix.spans() * 2, matrix.spans(), rows,
                               totals);
  const int64_t output = block * kBlock, size = std::min(kBlock, matrix.outputs - output);
  for (int64_t r = 0; r < kCount; ++r) {
    const int64_t place = (first + r) * matrix.outputs + output;
    if (residual) {
      for (int64_t n = 0; n < size; ++n) totals[r][n] += residual[place + n];
    }
    std::copy_n(totals[r], size, out + place);
  }
}

// Calls each(first, count) for tiles that are as even as can be: one of few rows is slower for each
// of them. The count is known when this is compiled.
template <typename Each>
inline void for_tiles(int64_t begin, int64_t end, const Each& each) {
  const int64_t count = end - begin, tiles = (count + kTileRows - 1) / kTileRows;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t first = begin + count * tile / tiles;
    switch (begin + count * (tile + 1) / tiles - first) {
      case 1: each(first, std::integral_constant<int, 1>{}); break;
      case 2: each(first, std::integral_constant<int, 2>{}); break;
      case 3: each(first, std::integral_constant<int, 3>{}); break;
      case 4: each(first, std::integral_constant<int, 4>{}); break;
      default: each(first, std::integral_constant<int, kTileRows>{});
    }
  }
}

// All rows of `x`, quantized by way of the prologue.
inline void quantize(xla::ffi::ThreadPool& pool, const Around& around, const float* x, int64_t rows,
                     int64_t width, const QuantizedRows& to) {
  if (rows * width < kSharedQuantization) {
    for (int64_t row = 0; row < rows; ++row) quantize_row(around, x, row, width, to);
  } else {
    const int64_t chunks = (rows + kQuantizedAtOnce - 1) / kQuantizedAtOnce;
    share(pool, chunks, [=, &around, &to](int64_t i) {
      const int64_t end = std::min(rows, (i + 1) * kQuantizedAtOnce);
      for (int64_t row = i * kQuantizedAtOnce; row < end; ++row) {
        quantize_row(around, x, row, width, to);
      }
    });
  }
}

// `out = residual + rows * matrix`
template <typename Group>
void multiply(xla::ffi::ThreadPool& pool, const Matrix<Group>& matrix, const QuantizedRows& from,
              int64_t rows, const float* residual, float* out) {
  const int64_t blocks = matrix.blocks();
  // Neighbouring blocks to the same thread, as memory is read ahead; but enough chunks that no
  // thread waits long for another.
  const int64_t chunk = std::clamp<int64_t>(blocks / 16, 1, 16);
  share(pool, (blocks + chunk - 1) / chunk, [=, &matrix, &from](int64_t i) {
    const int64_t last = std::min(blocks, (i + 1) * chunk);
    for (int64_t begin = 0; begin < rows; begin += kNearRows) {
      const int64_t end = std::min(rows, begin + kNearRows);
      for (int64_t block = i * chunk; block < last; ++block) {
        for_tiles(begin, end, [&](int64_t first, auto count) {
          multiply_rows<Group, decltype(count)::value>(matrix, block, from.from(first), first,
                                                       residual, out);
        });
      }
    }
  });
}

// `out = residual + prologue(x) * matrix`.
//
// What the prologue gives has `width` columns, at most the matrix's inputs. `x` has as many, or
// twice as many for kSwiGlu: gates, then what they let through. `out` is `[rows, outputs]`.
template <typename Group>
void linear(xla::ffi::ThreadPool& pool, const Matrix<Group>& matrix, const Around& around,
            const float* x, int64_t rows, int64_t width, float* out) {
  thread_local Quantized kept;
  const QuantizedRows quantized = kept.reserve(rows, matrix.inputs);
  quantize(pool, around, x, rows, width, quantized);
  multiply(pool, matrix, quantized, rows, around.residual, out);
}

// Rows of a table: `out[i] = weights of output ids[i]`, `[count, inputs]`.
inline void take(const Matrix<Bits8>& matrix, const int32_t* ids, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t id = std::clamp<int64_t>(ids[i], 0, matrix.outputs - 1);
    const Bits8* group = matrix.groups + id / kBlock * (matrix.inputs / kGroup);
    float* to = out + i * matrix.inputs;
    for (int64_t g = 0; g < matrix.inputs / kGroup; ++g, ++group) {
      const float scale = from_float16(group->scales[id % kBlock]);
      for (int64_t k = 0; k < kGroup; ++k, ++to) {
        *to = scale * static_cast<float>(group->values[k / 4][id % kBlock][k % 4] - 128);
      }
    }
  }
}

}  // namespace
