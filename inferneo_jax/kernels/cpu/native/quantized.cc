// Products with matrices of 8-bit or 4-bit integers. Rows are quantized on the way, and work is
// shared out over threads. A feed-forward block is one call: what lies between its products is
// quantized where it is computed, and never written as floats, which take 8 times as many bytes.

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "binding.h"
#include "pool.h"
#include "quantized_rows.h"
#include "quantized_tiles.h"

namespace {
namespace quantized {

using inferneo::share;

// Rows of a tile, whose sums are kept in registers: there are 32 with AVX-512, else 16.
constexpr int64_t kTileRows = kDotLanes == 16 ? 5 : 3;
// Rows that are multiplied by a block while it is in cache: their values fill half of an L2 cache.
constexpr int64_t kNearRows = 256;
// Quantizing fewer elements than this wakes no other thread.
constexpr int64_t kSharedQuantization = 8192;
// Rows that a thread quantizes at a time otherwise.
constexpr int64_t kQuantizedAtOnce = 4;

template <typename Group>
struct Matrix {
  const Group* groups;
  int64_t inputs, outputs;  // inputs are padded to whole spans, outputs are not padded

  int64_t spans() const { return inputs / kSpan; }
  int64_t blocks() const { return (outputs + kBlock - 1) / kBlock; }
};

// What happens to rows before and after they are multiplied.
struct Fusion {
  enum Prologue : int64_t { kNone, kRmsNorm, kSwiGlu } prologue;
  const float* norm;  // for kRmsNorm: [width]
  float eps;
  const float* residual;  // added to the product: [rows, outputs], or null
};

// Memory that rows are quantized into, and read from as `Rows`.
struct QuantizedRows {
  int8_t* values;
  float* scales;
  int32_t* sums;
  int64_t inputs;

  Rows from(int64_t row) const {
    return {values + row * inputs, scales + row * inputs / kSpan, sums + row * inputs / kGroup,
            inputs};
  }
  void put(int64_t row, int64_t span, const Floats16 (&x)[kSpan / 16]) const {
    const int64_t at = row * inputs / kSpan + span;
    quantize_span(x, values + at * kSpan, scales + at, sums + at * (kSpan / kGroup));
  }
};

// The numbers of the rows that are not padding.
struct LiveRows {
  const int32_t* rows;
  int64_t count;
};

// A thread's memory for quantized rows, kept from call to call.
class Scratch {
 public:
  int32_t* live(int64_t rows) {
    grow(live_, rows);
    return live_.data();
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
  std::vector<int32_t> live_;
  std::vector<int8_t> values_;
  std::vector<float> scales_;
  std::vector<int32_t> sums_;
};

// Finds the rows that are not padding, and completes those that are. Padded rows of `x` are zeros, and
// so are their products: only the residual is left. `x` has `columns`, `residual` and `out` have
// `outputs`.
inline LiveRows skip_padding(const float* x, int64_t rows, int64_t columns, const float* residual,
                             int64_t outputs, float* out, int32_t* live) {
  int64_t count = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const float* const from = x + row * columns;
    if (!std::all_of(from, from + columns, [](float value) { return value == 0; })) {
      live[count++] = static_cast<int32_t>(row);
    } else if (residual) {
      std::copy_n(residual + row * outputs, outputs, out + row * outputs);
    } else {
      std::fill_n(out + row * outputs, outputs, 0.0f);
    }
  }
  return {live, count};
}

// Applies the prologue to row `row` of `x` and quantizes it as number `index` of `to`. The prologue
// gives `width` columns, which zeros follow up to the inputs.
inline void quantize_row(const Fusion& fusion, const float* x, int64_t row, int64_t width,
                         int64_t index, const QuantizedRows& to) {
  const auto prologue = fusion.prologue;
  x += row * width * (prologue == Fusion::kSwiGlu ? 2 : 1);
  const float factor = prologue == Fusion::kRmsNorm ? rms_factor(x, width, fusion.eps) : 1.0f;
  for (int64_t first = 0; first < to.inputs; first += kSpan) {
    Floats16 span[kSpan / 16];
    UNROLL for (int64_t i = 0; i < kSpan / 16; ++i) {
      const int64_t at = first + i * 16;
      auto load = [=](const float* from, Floats16& some) {
        at + 16 <= width ? load16(from + at, some) : load_some(from + at, width - at, some);
      };
      Floats16 other;
      load(x, span[i]);
      if (prologue == Fusion::kRmsNorm) {
        load(fusion.norm, other);
        span[i] = span[i] * factor * other;
      } else if (prologue == Fusion::kSwiGlu) {
        load(x + width, other);
        swiglu(span[i], other, span[i]);
      }
    }
    to.put(index, first / kSpan, span);
  }
}

// Multiplies quantized rows by one block of outputs. `numbers` are their rows of `residual` and `out`.
template <typename Group, int kCount>
inline void multiply_rows(const Matrix<Group>& matrix, int64_t block, const Rows& rows,
                          const int32_t* numbers, const float* residual, float* out) {
  float totals[kCount][kBlock];
  const int64_t output = block * kBlock, size = std::min(kBlock, matrix.outputs - output);
  // The lines that are written below are loaded meanwhile.
  for (int64_t r = 0; r < kCount; ++r) {
    float* const to = out + numbers[r] * matrix.outputs + output;
    __builtin_prefetch(to, 1);
    __builtin_prefetch(to + size / 2, 1);
    __builtin_prefetch(to + size - 1, 1);
  }
  multiply_tile<Group, kCount>(matrix.groups + block * matrix.spans() * 2, matrix.spans(), rows,
                               totals);
  for (int64_t r = 0; r < kCount; ++r) {
    const int64_t place = numbers[r] * matrix.outputs + output;
    if (residual) {
      for (int64_t n = 0; n < size; ++n) totals[r][n] += residual[place + n];
    }
    std::copy_n(totals[r], size, out + place);
  }
}

// Calls each(first, count) for tiles of nearly equal size, as a tile of few rows costs more for each
// row. The count is a compile-time constant.
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

// Applies the prologue to the live rows of `x` and quantizes them.
inline void quantize(xla::ffi::ThreadPool& pool, const Fusion& fusion, const float* x,
                     const LiveRows& live, int64_t width, const QuantizedRows& to) {
  const auto some = [=, &fusion, &to](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) quantize_row(fusion, x, live.rows[i], width, i, to);
  };
  if (live.count * width < kSharedQuantization) return some(0, live.count);
  const int64_t chunks = (live.count + kQuantizedAtOnce - 1) / kQuantizedAtOnce;
  share(pool, chunks, [=](int64_t i) {
    some(i * kQuantizedAtOnce, std::min(live.count, (i + 1) * kQuantizedAtOnce));
  });
}

// `out = residual + rows * matrix`, for the live rows.
template <typename Group>
void multiply(xla::ffi::ThreadPool& pool, const Matrix<Group>& matrix, const QuantizedRows& from,
              const LiveRows& live, const float* residual, float* out) {
  const int64_t blocks = matrix.blocks();
  // A thread takes neighbouring blocks, as memory is read ahead, but there are enough chunks that no
  // thread waits long for another.
  const int64_t chunk = std::clamp<int64_t>(blocks / 16, 1, 16);
  share(pool, (blocks + chunk - 1) / chunk, [=, &matrix, &from](int64_t i) {
    const int64_t last = std::min(blocks, (i + 1) * chunk);
    for (int64_t begin = 0; begin < live.count; begin += kNearRows) {
      const int64_t end = std::min(live.count, begin + kNearRows);
      for (int64_t block = i * chunk; block < last; ++block) {
        for_tiles(begin, end, [&](int64_t first, auto count) {
          multiply_rows<Group, decltype(count)::value>(matrix, block, from.from(first),
                                                       live.rows + first, residual, out);
        });
      }
    }
  });
}

// `out = residual + prologue(x) * matrix`.
//
// The prologue gives `width` columns, at most the matrix's inputs. `x` has as many, or twice as many
// for kSwiGlu: the gates, then the values they are multiplied by. `out` is `[rows, outputs]`.
template <typename Group>
void linear(xla::ffi::ThreadPool& pool, const Matrix<Group>& matrix, const Fusion& fusion,
            const float* x, int64_t rows, int64_t width, float* out) {
  thread_local Scratch scratch;
  const int64_t columns = fusion.prologue == Fusion::kSwiGlu ? 2 * width : width;
  const LiveRows live = skip_padding(x, rows, columns, fusion.residual, matrix.outputs, out,
                                     scratch.live(rows));
  const QuantizedRows quantized = scratch.reserve(live.count, matrix.inputs);
  quantize(pool, fusion, x, live, width, quantized);
  multiply(pool, matrix, quantized, live, fusion.residual, out);
}

// Rows of a table: `out[i]` are the weights of output `ids[i]`; `out` is `[count, inputs]`.
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

// Computes one span of `silu(gate) * up` for rows from `first` on. The matrix's outputs are all gates,
// then all ups.
template <typename Group, int kCount>
inline void gate_rows(const Matrix<Group>& matrix, int64_t span, const Rows& rows, int64_t first,
                      const QuantizedRows& gated) {
  constexpr int64_t kBlocks = kSpan / kBlock, kVectors = kBlock / 16;
  alignas(64) float totals[2][kBlocks][kCount][kBlock];
  for (int64_t part = 0; part < 2; ++part) {
    for (int64_t i = 0; i < kBlocks; ++i) {
      const int64_t block = part * (gated.inputs / kBlock) + span * kBlocks + i;
      multiply_tile<Group, kCount>(matrix.groups + block * matrix.spans() * 2, matrix.spans(), rows,
                                   totals[part][i]);
    }
  }
  for (int64_t r = 0; r < kCount; ++r) {
    Floats16 x[kSpan / 16];
    UNROLL for (int64_t i = 0; i < kSpan / 16; ++i) {
      Floats16 gate, up;
      load16(totals[0][i / kVectors][r] + i % kVectors * 16, gate);
      load16(totals[1][i / kVectors][r] + i % kVectors * 16, up);
      swiglu(gate, up, x[i]);
    }
    gated.put(first + r, span, x);
  }
}

// `out = x + down(silu(gate(norm(x))) * up(norm(x)))`, with the bits of two calls of linear(). `x` and
// `out` are `[rows, down.outputs]`; `fusion` has the norm, and `x` as residual.
template <typename Group>
void feed_forward(xla::ffi::ThreadPool& pool, const Matrix<Group>& gate_up,
                  const Matrix<Group>& down, const Fusion& fusion, const float* x, int64_t rows,
                  float* out) {
  thread_local Scratch scratch, scratch_between;
  const LiveRows live = skip_padding(x, rows, down.outputs, fusion.residual, down.outputs, out,
                                     scratch.live(rows));
  const QuantizedRows normal = scratch.reserve(live.count, gate_up.inputs);
  const QuantizedRows gated = scratch_between.reserve(live.count, down.inputs);
  quantize(pool, fusion, x, live, down.outputs, normal);
  share(pool, down.spans(), [&](int64_t span) {
    for (int64_t begin = 0; begin < live.count; begin += kNearRows) {
      for_tiles(begin, std::min(live.count, begin + kNearRows), [&](int64_t first, auto count) {
        gate_rows<Group, decltype(count)::value>(gate_up, span, normal.from(first), first, gated);
      });
    }
  });
  multiply(pool, down, gated, live, fusion.residual, out);
}

// --- Bindings ---

using Vector32 = ffi::BufferR1<ffi::F32>;
using Table32 = ffi::BufferR2<ffi::F32>;
using Weights = ffi::BufferR3<ffi::U8>;

// `weights` is `[blocks, groups, bytes of a Group]`; `norm` and `residual` may be empty.
template <typename Group>
ffi::Error linear_call(ffi::ThreadPool pool, Table32 x, Weights weights, Vector32 norm,
                       Table32 residual, int64_t prologue, float eps,
                       ffi::Result<Table32> out) {
  const auto w = weights.dimensions(), o = out->dimensions();
  const int64_t rows = x.dimensions()[0], inputs = w[1] * kGroup;
  const int64_t width = x.dimensions()[1] / (prologue == Fusion::kSwiGlu ? 2 : 1);
  if (w[2] != sizeof(Group) || inputs % kSpan) return invalid("the weights have another layout");
  if (width > inputs || o[0] != rows || o[1] > w[0] * kBlock) {
    return invalid("x has more columns than the matrix, or the result another shape");
  }
  if (prologue == Fusion::kRmsNorm && static_cast<int64_t>(norm.element_count()) != width) {
    return invalid("the norm has another width than x");
  }
  const bool added = residual.element_count() > 0;
  if (added && residual.element_count() != out->element_count()) {
    return invalid("the residual has another shape than the result");
  }
  const Matrix<Group> matrix{reinterpret_cast<const Group*>(weights.typed_data()), inputs, o[1]};
  const Fusion fusion{static_cast<Fusion::Prologue>(prologue), norm.typed_data(), eps,
                      added ? residual.typed_data() : nullptr};
  linear(pool, matrix, fusion, x.typed_data(), rows, width, out->typed_data());
  return ffi::Error::Success();
}

template <typename Group>
ffi::Error feed_forward_call(ffi::ThreadPool pool, Table32 x, Weights gate_up,
                             Weights down, Vector32 norm, float eps,
                             ffi::Result<Table32> out) {
  const auto first = gate_up.dimensions(), second = down.dimensions(), o = out->dimensions();
  const int64_t rows = o[0], width = o[1];
  if (first[2] != sizeof(Group) || second[2] != sizeof(Group)) {
    return invalid("the weights have another layout");
  }
  const Matrix<Group> up{reinterpret_cast<const Group*>(gate_up.typed_data()), first[1] * kGroup,
                         first[0] * kBlock};
  const Matrix<Group> back{reinterpret_cast<const Group*>(down.typed_data()), second[1] * kGroup,
                           width};
  if (up.inputs % kSpan || back.inputs % kSpan || up.outputs != 2 * back.inputs) {
    return invalid("gates and ups must be of whole spans, and as many as the second matrix takes");
  }
  if (x.dimensions()[0] != rows || x.dimensions()[1] != width || width > up.inputs ||
      width > second[0] * kBlock || static_cast<int64_t>(norm.element_count()) != width) {
    return invalid("x, the norm and the result must be as wide as the matrices");
  }
  const Fusion fusion{Fusion::kRmsNorm, norm.typed_data(), eps, x.typed_data()};
  feed_forward(pool, up, back, fusion, x.typed_data(), rows, out->typed_data());
  return ffi::Error::Success();
}

ffi::Error take_call(ffi::BufferR1<ffi::S32> ids, Weights weights, ffi::Result<Table32> out) {
  const auto w = weights.dimensions(), o = out->dimensions();
  const int64_t count = ids.dimensions()[0], inputs = w[1] * kGroup;
  if (w[2] != sizeof(Bits8)) return invalid("the table has another layout");
  if (o[0] != count || o[1] != inputs) return invalid("the result has another shape");
  const Matrix<Bits8> matrix{reinterpret_cast<const Bits8*>(weights.typed_data()), inputs,
                             w[0] * kBlock};
  take(matrix, ids.typed_data(), count, out->typed_data());
  return ffi::Error::Success();
}

auto linear_binding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<Table32>()
      .Arg<Weights>()
      .Arg<Vector32>()
      .Arg<Table32>()
      .Attr<int64_t>("prologue")
      .Attr<float>("eps")
      .Ret<Table32>();
}

auto feed_forward_binding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<Table32>()
      .Arg<Weights>()
      .Arg<Weights>()
      .Arg<Vector32>()
      .Attr<float>("eps")
      .Ret<Table32>();
}

auto take_binding() {
  return ffi::Ffi::Bind().Arg<ffi::BufferR1<ffi::S32>>().Arg<Weights>().Ret<Table32>();
}

}  // namespace quantized
}  // namespace

using namespace quantized;
XLA_FFI_DEFINE_HANDLER_SYMBOL(linear_8, linear_call<Bits8>, linear_binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(linear_4, linear_call<Bits4>, linear_binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(feed_forward_8, feed_forward_call<Bits8>, feed_forward_binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(feed_forward_4, feed_forward_call<Bits4>, feed_forward_binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(take_8, take_call, take_binding());
