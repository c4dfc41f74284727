// Products with matrices of int8 or 4 bits: rows are quantized on the way, work is shared out.
#pragma once

#include <algorithm>
#include <cstdint>
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

// Memory of a thread for quantized rows, kept from call to call.
struct Quantized {
  std::vector<int32_t> live;  // which rows these are: those that are not zeros
  std::vector<int8_t> values;
  std::vector<float> scales;
  std::vector<int32_t> sums;

  void reserve(int64_t rows, int64_t inputs) {
    grow(live, rows);
    grow(values, rows * inputs);
    grow(scales, rows * inputs / kSpan);
    grow(sums, rows * inputs / kGroup);
  }
  template <typename T>
  static void grow(std::vector<T>& kept, size_t size) {
    if (kept.size() < size) kept.resize(size);
  }
};

// Whether a row is padding, which is zeros: then so is all that is made of it.
inline bool is_zero(const float* x, int64_t size) {
  return std::all_of(x, x + size, [](float value) { return value == 0; });
}

// Row `row` of `x`, by way of the prologue, as number `to` of what is quantized. What it gives
// has `width` columns, and zeros behind them up to `inputs`.
inline void quantize_row(const Around& around, const float* x, int64_t row, int64_t to,
                         int64_t width, int64_t inputs, int8_t* values, float* scales,
                         int32_t* sums) {
  const auto prologue = around.prologue;
  x += row * width * (prologue == Around::kSwiGlu ? 2 : 1);
  values += to * inputs;
  scales += to * inputs / kSpan;
  sums += to * inputs / kGroup;
  const float factor = prologue == Around::kRmsNorm ? rms_factor(x, width, around.eps) : 1.0f;
  for (int64_t first = 0; first < inputs; first += kSpan) {
    Floats16 span[kSpan / kStride];
    UNROLL for (int64_t i = 0; i < kSpan / kStride; ++i) {
      const int64_t at = first + i * kStride;
      auto load = [=](const float* from, Floats16& loaded) {
        at + kStride <= width ? load16(from + at, loaded) : load_some(from + at, width - at, loaded);
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
    const int64_t number = first / kSpan;
    quantize_span<kSpan, kGroup>(span, values + first, scales + number,
                                 sums + number * (kSpan / kGroup));
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
    __builtin_prefetch(to + 16, 1);
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

// `out = residual + prologue(x) * matrix`.
//
// What the prologue gives has `width` columns, at most the matrix's inputs. `x` has as many, or
// twice as many for kSwiGlu: gates, then what they let through. `out` is `[rows, outputs]`.
template <typename Group>
void linear(xla::ffi::ThreadPool& pool, const Matrix<Group>& matrix, const Around& around,
            const float* x, int64_t rows, int64_t width, float* out) {
  const int64_t inputs = matrix.inputs, blocks = matrix.blocks();
  thread_local Quantized kept;
  kept.reserve(rows, inputs);
  const int64_t columns = around.prologue == Around::kSwiGlu ? 2 * width : width;
  int64_t live = 0;
  for (int64_t row = 0; row < rows; ++row) {
    if (!is_zero(x + row * columns, columns)) {
      kept.live[live++] = row;
    } else if (around.residual) {
      std::copy_n(around.residual + row * matrix.outputs, matrix.outputs, out + row * matrix.outputs);
    } else {
      std::fill_n(out + row * matrix.outputs, matrix.outputs, 0.0f);
    }
  }
  const int32_t* const names = kept.live.data();
  int8_t* const values = kept.values.data();
  float* const scales = kept.scales.data();
  int32_t* const sums = kept.sums.data();
  auto quantize = [=, &around](int64_t i) {
    quantize_row(around, x, names[i], i, width, inputs, values, scales, sums);
  };
  if (live * width < kSharedQuantization) {
    for (int64_t i = 0; i < live; ++i) quantize(i);
  } else {
    share(pool, live, quantize);
  }

  using Tile =
      void (*)(const Matrix<Group>&, int64_t, const Rows&, const int32_t*, const float*, float*);
  static constexpr Tile kTiles[] = {multiply_rows<Group, 1>, multiply_rows<Group, 2>,
                                    multiply_rows<Group, 3>, multiply_rows<Group, 4>,
                                    multiply_rows<Group, 5>};
  auto multiply = [=, &matrix, &around](int64_t block, int64_t begin, int64_t end) {
    const int64_t count = end - begin, tiles = (count + kTileRows - 1) / kTileRows;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      // As even as can be: a tile of few rows is slower for each of them.
      const int64_t first = begin + count * tile / tiles;
      const int64_t size = begin + count * (tile + 1) / tiles - first;
      const Rows some{values + first * inputs, scales + first * inputs / kSpan,
                      sums + first * inputs / kGroup, inputs};
      kTiles[size - 1](matrix, block, some, names + first, around.residual, out);
    }
  };
  // Neighbouring blocks to the same thread, as memory is read ahead; but enough chunks that no
  // thread waits long for another.
  const int64_t chunk = std::clamp<int64_t>(blocks / 16, 1, 16);
  share(pool, (blocks + chunk - 1) / chunk, [=](int64_t i) {
    const int64_t end = std::min(blocks, (i + 1) * chunk);
    for (int64_t begin = 0; begin < live; begin += kNearRows) {
      for (int64_t block = i * chunk; block < end; ++block) {
        multiply(block, begin, std::min(live, begin + kNearRows));
      }
    }
  });
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
