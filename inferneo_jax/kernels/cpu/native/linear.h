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

// Rows that are no padding, by their numbers in what is given and made.
struct LiveRows {
  const int32_t* names;
  int64_t count;
};

// Memory of a thread for quantized rows, kept from call to call.
class Quantized {
 public:
  int32_t* names(int64_t rows) {
    grow(names_, rows);
    return names_.data();
  }
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
  std::vector<int32_t> names_;
  std::vector<int8_t> values_;
  std::vector<float> scales_;
  std::vector<int32_t> sums_;
};

// Padding is rows of zeros, and so is all that is made of it: only what is added to them is left.
// `x` has `columns`, `out` and what is added `outputs`.
inline LiveRows leave_padding(const float* x, int64_t rows, int64_t columns, const float* residual,
                              int64_t outputs, float* out, int32_t* names) {
  int64_t count = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const float* const from = x + row * columns;
    if (!std::all_of(from, from + columns, [](float value) { return value == 0; })) {
      names[count++] = static_cast<int32_t>(row);
    } else if (residual) {
      std::copy_n(residual + row * outputs, outputs, out + row * outputs);
    } else {
      std::fill_n(out + row * outputs, outputs, 0.0f);
    }
  }
  return {names, count};
}

// Row `row` of `x`, by way of the prologue, as number `number` of what is quantized. What it gives
// has `width` columns, and zeros behind them up to the inputs.
inline void quantize_row(const Around& around, const float* x, int64_t row, int64_t width,
                         int64_t number, const QuantizedRows& to) {
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
    to.put(number, first / kSpan, span);
  }
}

// Some quantized rows times one block of outputs, into those rows of `out` that are named.
template <typename Group, int kCount>
inline void multiply_rows(const Matrix<Group>& matrix, int64_t block, const Rows& rows,
                          const int32_t* names, const float* residual, float* out) {
  float totals[kCount][kBlock];
  const int64_t output = block * kBlock, size = std::min(kBlock, matrix.outputs - output);
  // Asked for now, the lines that are written below come in meanwhile.
  for (int64_t r = 0; r < kCount; ++r) {
    float* const to = out + names[r] * matrix.outputs + output;
    __builtin_prefetch(to, 1);
    __builtin_prefetch(to + size / 2, 1);
    __builtin_prefetch(to + size - 1, 1);
  }
  multiply_tile<Group, kCount>(matrix.groups + block * matrix.spans() * 2, matrix.spans(), rows,
                               totals);
  for (int64_t r = 0; r < kCount; ++r) {
    const int64_t place = names[r] * matrix.outputs + output;
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

// The live rows of `x`, quantized by way of the prologue.
inline void quantize(xla::ffi::ThreadPool& pool, const Around& around, const float* x,
                     const LiveRows& live, int64_t width, const QuantizedRows& to) {
  const auto some = [=, &around, &to](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) quantize_row(around, x, live.names[i], width, i, to);
  };
  if (live.count * width < kSharedQuantization) return some(0, live.count);
  const int64_t chunks = (live.count + kQuantizedAtOnce - 1) / kQuantizedAtOnce;
  share(pool, chunks, [=](int64_t i) {
    some(i * kQuantizedAtOnce, std::min(live.count, (i + 1) * kQuantizedAtOnce));
  });
}

// `out = residual + rows * matrix`, for the live rows
template <typename Group>
void multiply(xla::ffi::ThreadPool& pool, const Matrix<Group>& matrix, const QuantizedRows& from,
              const LiveRows& live, const float* residual, float* out) {
  const int64_t blocks = matrix.blocks();
  // Neighbouring blocks to the same thread, as memory is read ahead; but enough chunks that no
  // thread waits long for another.
  const int64_t chunk = std::clamp<int64_t>(blocks / 16, 1, 16);
  share(pool, (blocks + chunk - 1) / chunk, [=, &matrix, &from](int64_t i) {
    const int64_t last = std::min(blocks, (i + 1) * chunk);
    for (int64_t begin = 0; begin < live.count; begin += kNearRows) {
      const int64_t end = std::min(live.count, begin + kNearRows);
      for (int64_t block = i * chunk; block < last; ++block) {
        for_tiles(begin, end, [&](int64_t first, auto count) {
          multiply_rows<Group, decltype(count)::value>(matrix, block, from.from(first),
                                                       live.names + first, residual, out);
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
  const int64_t columns = around.prologue == Around::kSwiGlu ? 2 * width : width;
  const LiveRows live = leave_padding(x, rows, columns, around.residual, matrix.outputs, out,
                                      kept.names(rows));
  const QuantizedRows quantized = kept.reserve(live.count, matrix.inputs);
  quantize(pool, around, x, live, width, quantized);
  multiply(pool, matrix, quantized, live, around.residual, out);
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
