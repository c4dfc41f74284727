// Products with matrices of floats or bfloat16, and what follows them: a bias, a residual, GELU or
// a layer normalisation.
#pragma once

#include <atomic>
#include <cmath>
#include <memory>
#include <vector>

#include "dense_tiles.h"
#include "pool.h"

namespace {
namespace dense {

// Rows that are multiplied with a block while it is near: of whole tiles.
constexpr int64_t kNearRows = 96;
// Tasks that keep all threads busy to the end.
constexpr int64_t kTasks = 32;
// Products that wake no other thread.
constexpr int64_t kAlone = 100000;

template <class F>
struct Matrix {
  const typename F::Stored* numbers;
  int64_t inputs, outputs;  // as they are wanted, without padding

  int64_t blocks() const { return (outputs + kOutputs - 1) / kOutputs; }
  int64_t packs() const { return whole_packs<F>(inputs) / F::kPack; }
  const typename F::Stored* block(int64_t index) const {
    return numbers + index * packs() * F::kPack * kOutputs;
  }
};

// What is done to products; null leaves a part out.
struct After {
  const float* bias;      // [outputs]
  const float* residual;  // [rows, outputs]
  bool gelu;
  const float *scale, *shift;  // of a layer normalisation: [outputs]
  float eps;
};

// x * (1 + erf(x / sqrt(2))) / 2, to 7e-7: max(x, 0) - |x| * tail(|x|), where the tail is that of
// the normal distribution. Its logarithm is nearly a parabola; this is the polynomial of degree 5
// that makes the largest error of the whole the least.
inline Vector gelu(Vector x) {
  const Vector size = max(x, -x);
  Vector y = splat(-4.73294116e-4f);
  y = fma(y, size, splat(7.08446186e-3f));
  y = fma(y, size, splat(-5.18271700e-2f));
  y = fma(y, size, splat(-0.459992647f));
  y = fma(y, size, splat(-1.15078783f));
  y = fma(y, size, splat(-1.00003767f));
  return fma(-size, exp2_of(y), max(x, Vector{}));
}

// (row - mean) / sqrt(variance + eps) * scale + shift, in place.
inline void layer_norm(float* row, int64_t size, const After& after) {
  Vector sums = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) sums += load(row + i);
  float sum = sum_of(sums);
  for (; i < size; ++i) sum += row[i];
  const float mean = sum / (float)size;
  sums = Vector{};
  for (i = 0; i + kLanes <= size; i += kLanes) {
    const Vector centred = load(row + i) - mean;
    sums = fma(centred, centred, sums);
  }
  sum = sum_of(sums);
  for (; i < size; ++i) sum += (row[i] - mean) * (row[i] - mean);
  const float factor = 1.0f / std::sqrt(sum / (float)size + after.eps);
  for (i = 0; i + kLanes <= size; i += kLanes) {
    const Vector normal = (load(row + i) - mean) * factor;
    store(row + i, fma(normal, load(after.scale + i), load(after.shift + i)));
  }
  for (; i < size; ++i) row[i] = (row[i] - mean) * factor * after.scale[i] + after.shift[i];
}

// A row's products with one block on their way out, from `output` on.
template <class Out>
inline void finish(const After& after, int64_t outputs, int64_t row, int64_t output,
                   float* __restrict totals, Out* out) {
  const int64_t place = row * outputs + output, count = std::min(outputs - output, kOutputs);
  if (after.bias) {
    for (int64_t i = 0; i < count; ++i) totals[i] += after.bias[output + i];
  }
  if (after.residual) {
    for (int64_t i = 0; i < count; ++i) totals[i] += after.residual[place + i];
  }
  if (after.gelu) {
    for (int64_t i = 0; i < kOutputs; i += kLanes) store(totals + i, gelu(load(totals + i)));
  }
  if (count == kOutputs) {
    for (int64_t i = 0; i < kOutputs; i += kLanes) put(load(totals + i), out + place + i);
  } else {
    for (int64_t i = 0; i < count; ++i) narrow(totals[i], out + place + i);
  }
}

// Some rows as operands of products, with room up to kFewRows: where they lie, or a copy of them.
template <class F, class X>
const typename F::Operand* operands_of(const X* x, int64_t begin, int64_t end, int64_t total,
                                       int64_t inputs) {
  using Operand = typename F::Operand;
  const int64_t stride = whole_packs<F>(inputs);
  if constexpr (std::is_same_v<X, Operand>) {
    if (stride == inputs && begin + round_up(end - begin, kFewRows) <= total) {
      return x + begin * inputs;
    }
  }
  thread_local std::vector<Operand> kept;
  const size_t room = round_up(end - begin, kFewRows) * stride;
  if (kept.size() < room) kept.resize(room);
  for (int64_t row = begin; row < end; ++row) {
    put_operands<F>(x + row * inputs, inputs, kept.data() + (row - begin) * stride);
  }
  return kept.data();
}

// `out = after(x * matrix)` for the first `rows` rows of `total`: `x` is `[total, inputs]`, `out` is
// `[total, outputs]`. With a layer normalisation `out` is of floats.
//
// Work is cut into chunks of rows and parts of the blocks. Rows are normalised by whoever ends the
// last part of a chunk.
template <class F, class X, class Out>
void linear(xla::ffi::ThreadPool& pool, const Matrix<F>& matrix, const After& after, const X* x,
            int64_t rows, int64_t total, Out* out) {
  using Operand = typename F::Operand;
  const int64_t inputs = matrix.inputs, outputs = matrix.outputs, blocks = matrix.blocks();
  const int64_t chunks = (rows + kNearRows - 1) / kNearRows, stride = whole_packs<F>(inputs);
  if (!chunks) return;
  const bool alone = rows * inputs * outputs < kAlone;
  const int64_t parts = alone ? 1 : std::min((kTasks + chunks - 1) / chunks, blocks);
  const std::unique_ptr<std::atomic<int64_t>[]> ended(new std::atomic<int64_t>[chunks]());

  const auto multiply = [&](int64_t begin, int64_t end, int64_t first, int64_t last) {
    const Operand* const operands = operands_of<F>(x, begin, end, total, inputs);
    for (int64_t block = first; block < last; ++block) {
      for (int64_t row = begin; row < end; row += kMostRows) {
        const int64_t count = std::min<int64_t>(end - row, kMostRows);
        float totals[kMostRows][kOutputs];
        multiply_tile<F>(count, operands + (row - begin) * stride, stride, matrix.block(block),
                         matrix.packs(), totals);
        for (int64_t r = 0; r < count; ++r) {
          finish(after, outputs, row + r, block * kOutputs, totals[r], out);
        }
      }
    }
  };
  const auto work = [&](int64_t task) {
    const int64_t chunk = task / parts, part = task % parts;
    const int64_t begin = chunk * kNearRows, end = std::min(rows, begin + kNearRows);
    multiply(begin, end, blocks * part / parts, blocks * (part + 1) / parts);
    if constexpr (std::is_same_v<Out, float>) {
      if (after.scale && ended[chunk].fetch_add(1, std::memory_order_acq_rel) == parts - 1) {
        for (int64_t row = begin; row < end; ++row) layer_norm(out + row * outputs, outputs, after);
      }
    }
  };
  if (alone) {
    for (int64_t chunk = 0; chunk < chunks; ++chunk) work(chunk);
  } else {
    share(pool, chunks * parts, work);
  }
}

}  // namespace dense
}  // namespace
