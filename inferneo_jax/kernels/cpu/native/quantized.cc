// Products with matrices in block formats. Rows are quantized on the way, and work is shared out over
// threads. A feed-forward block is one call: what lies between its products is quantized where it is
// computed, and never written as floats, which take 8 times as many bytes.

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "binding.h"
#include "blocks.h"
#include "pool.h"
#include "quantized_rows.h"

namespace {
namespace quantized {

using inferneo::block_format;
using inferneo::BlockFormat;
using inferneo::QuantizedRows;
using inferneo::share;
using inferneo::Totals;

// Rows that are multiplied by a block while it is in cache: their values fill half of an L2 cache.
constexpr int64_t kNearRows = 128;
// Quantizing fewer elements than this wakes no other thread.
constexpr int64_t kSharedQuantization = 8192;
// Rows that a thread quantizes at a time otherwise.
constexpr int64_t kQuantizedAtOnce = 4;

// A block of outputs: those from `column` on, `size` of them without padding.
struct Block {
  const BlockFormat* format;
  const uint8_t* data;
  int64_t column, size;
};

// Outputs that lie side by side, in blocks of which the last may be padded.
struct Run {
  const BlockFormat* format;
  const uint8_t* data;
  int64_t column, count;
  int64_t block_bytes;
  int64_t first_block;  // its number in the matrix

  Block block(int64_t index) const {
    const int64_t at = index * kBlock;
    return {format, data + index * block_bytes, column + at, std::min(kBlock, count - at)};
  }
};

// A matrix whose outputs have one format or several. The runs are in the order of their columns.
struct Matrix {
  std::vector<Run> runs;
  int64_t spans = 0, blocks = 0, outputs = 0;

  int64_t inputs() const { return spans * kSpan; }

  Block block(int64_t number) const {
    const auto after = std::upper_bound(runs.begin(), runs.end(), number,
                                        [](int64_t at, const Run& run) { return at < run.first_block; });
    return (after - 1)->block(number - (after - 1)->first_block);
  }

  // The block that a column is in.
  Block block_of(int64_t column) const {
    const auto after = std::upper_bound(runs.begin(), runs.end(), column,
                                        [](int64_t at, const Run& run) { return at < run.column; });
    return (after - 1)->block((column - (after - 1)->column) / kBlock);
  }
};

// What happens to rows before and after they are multiplied.
struct Fusion {
  enum Prologue : int64_t { kNone, kRmsNorm, kSwiGlu } prologue;
  const float* norm;  // for kRmsNorm: [width]
  float eps;
  const float* residual;  // added to the product: [rows, outputs], or null
};

// Memory that rows are quantized into.
struct RowMemory {
  int8_t* values;
  inferneo::RowSpan* about;
  int64_t spans, rows;

  QuantizedRows from(int64_t row) const {
    return QuantizedRows{values, about, spans, rows}.from(row);
  }
  void put(int64_t row, int64_t span, const Floats16 (&x)[kSpan / 16]) const {
    const int64_t at = span * rows + row;
    quantize_span(x, values + at * kSpan, about[at]);
  }
};

// The numbers of the rows that are not padding.
struct LiveRows {
  const int32_t* rows;
  int64_t count;
};

// A thread's memory, kept from call to call.
class Scratch {
 public:
  int32_t* live(int64_t rows) {
    grow(live_, rows);
    return live_.data();
  }
  RowMemory reserve(int64_t rows, int64_t spans) {
    grow(values_, rows * spans * kSpan);
    grow(about_, rows * spans);
    return {values_.data(), about_.data(), spans, rows};
  }
  // Totals of rows, for `blocks` blocks one after the other.
  Totals totals(int64_t rows, int64_t blocks) {
    grow(totals_, rows * blocks * kBlock);
    return reinterpret_cast<Totals>(totals_.data());
  }

 private:
  template <typename T>
  static void grow(std::vector<T>& kept, size_t size) {
    if (kept.size() < size) kept.resize(size);
  }
  std::vector<int32_t> live_;
  std::vector<int8_t> values_;
  std::vector<inferneo::RowSpan> about_;
  std::vector<float> totals_;
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
                         int64_t index, const RowMemory& to) {
  const auto prologue = fusion.prologue;
  x += row * width * (prologue == Fusion::kSwiGlu ? 2 : 1);
  const float factor = prologue == Fusion::kRmsNorm ? rms_factor(x, width, fusion.eps) : 1.0f;
  for (int64_t first = 0; first < to.spans * kSpan; first += kSpan) {
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

// Applies the prologue to the live rows of `x` and quantizes them.
inline void quantize(xla::ffi::ThreadPool& pool, const Fusion& fusion, const float* x,
                     const LiveRows& live, int64_t width, const RowMemory& to) {
  const auto some = [=, &fusion, &to](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) quantize_row(fusion, x, live.rows[i], width, i, to);
  };
  if (live.count * width < kSharedQuantization) return some(0, live.count);
  const int64_t chunks = (live.count + kQuantizedAtOnce - 1) / kQuantizedAtOnce;
  share(pool, chunks, [=](int64_t i) {
    some(i * kQuantizedAtOnce, std::min(live.count, (i + 1) * kQuantizedAtOnce));
  });
}

// Adds the residual to the products of rows with a block, and writes them. `numbers` are the rows'
// numbers in `residual` and `out`, which have `outputs` columns.
inline void write_block(const Block& block, Totals totals, const int32_t* numbers, int64_t count,
                        int64_t outputs, const float* residual, float* out) {
  for (int64_t r = 0; r < count; ++r) {
    const int64_t place = numbers[r] * outputs + block.column;
    if (residual) {
      for (int64_t n = 0; n < block.size; ++n) totals[r][n] += residual[place + n];
    }
    std::copy_n(totals[r], block.size, out + place);
  }
}

// `out = residual + rows * matrix`, for the live rows.
void multiply(xla::ffi::ThreadPool& pool, const Matrix& matrix, const RowMemory& from,
              const LiveRows& live, const float* residual, float* out) {
  // A thread takes neighbouring blocks, as memory is read ahead, but there are enough chunks that no
  // thread waits long for another.
  const int64_t chunk = std::clamp<int64_t>(matrix.blocks / 16, 1, 16);
  share(pool, (matrix.blocks + chunk - 1) / chunk, [=, &matrix, &from](int64_t i) {
    thread_local Scratch scratch;
    const int64_t last = std::min(matrix.blocks, (i + 1) * chunk);
    for (int64_t begin = 0; begin < live.count; begin += kNearRows) {
      const int64_t count = std::min(live.count - begin, kNearRows);
      const Totals totals = scratch.totals(count, 1);
      for (int64_t number = i * chunk; number < last; ++number) {
        const Block block = matrix.block(number);
        block.format->multiply(block.data, from.from(begin), count, totals);
        write_block(block, totals, live.rows + begin, count, matrix.outputs, residual, out);
      }
    }
  });
}

// `out = residual + prologue(x) * matrix`.
//
// The prologue gives `width` columns, at most the matrix's inputs. `x` has as many, or twice as many
// for kSwiGlu: the gates, then the values they are multiplied by. `out` is `[rows, outputs]`.
void linear(xla::ffi::ThreadPool& pool, const Matrix& matrix, const Fusion& fusion, const float* x,
            int64_t rows, int64_t width, float* out) {
  thread_local Scratch scratch;
  const int64_t columns = fusion.prologue == Fusion::kSwiGlu ? 2 * width : width;
  const LiveRows live = skip_padding(x, rows, columns, fusion.residual, matrix.outputs, out,
                                     scratch.live(rows));
  const RowMemory quantized = scratch.reserve(live.count, matrix.spans);
  quantize(pool, fusion, x, live, width, quantized);
  multiply(pool, matrix, quantized, live, fusion.residual, out);
}

// Computes one span of `silu(gate) * up` for `count` rows from `first` on. The matrix's outputs are
// all gates, then all ups.
inline void gate_rows(const Matrix& matrix, int64_t span, const QuantizedRows& rows, int64_t first,
                      int64_t count, const RowMemory& gated) {
  constexpr int64_t kBlocks = kSpan / kBlock, kVectors = kBlock / 16;
  thread_local Scratch scratch;
  const Totals totals = scratch.totals(count, 2 * kBlocks);
  for (int64_t i = 0; i < 2 * kBlocks; ++i) {
    const int64_t part = i / kBlocks * gated.spans + span;
    const Block block = matrix.block_of(part * kSpan + i % kBlocks * kBlock);
    block.format->multiply(block.data, rows, count, totals + i * count);
  }
  for (int64_t r = 0; r < count; ++r) {
    Floats16 x[kSpan / 16];
    UNROLL for (int64_t i = 0; i < kSpan / 16; ++i) {
      Floats16 gate, up;
      load16(totals[i / kVectors * count + r] + i % kVectors * 16, gate);
      load16(totals[(kBlocks + i / kVectors) * count + r] + i % kVectors * 16, up);
      swiglu(gate, up, x[i]);
    }
    gated.put(first + r, span, x);
  }
}

// `out = x + down(silu(gate(norm(x))) * up(norm(x)))`, with the bits of two calls of linear(). `x` and
// `out` are `[rows, down.outputs]`; `fusion` has the norm, and `x` as residual.
void feed_forward(xla::ffi::ThreadPool& pool, const Matrix& gate_up, const Matrix& down,
                  const Fusion& fusion, const float* x, int64_t rows, float* out) {
  thread_local Scratch scratch, scratch_between;
  const LiveRows live = skip_padding(x, rows, down.outputs, fusion.residual, down.outputs, out,
                                     scratch.live(rows));
  const RowMemory normal = scratch.reserve(live.count, gate_up.spans);
  const RowMemory gated = scratch_between.reserve(live.count, down.spans);
  quantize(pool, fusion, x, live, down.outputs, normal);
  share(pool, down.spans, [&](int64_t span) {
    for (int64_t begin = 0; begin < live.count; begin += kNearRows) {
      const int64_t count = std::min(live.count - begin, kNearRows);
      gate_rows(gate_up, span, normal.from(begin), begin, count, gated);
    }
  });
  multiply(pool, down, gated, live, fusion.residual, out);
}

// --- Bindings ---

using Vector32 = ffi::BufferR1<ffi::F32>;
using Table32 = ffi::BufferR2<ffi::F32>;
using Weights = ffi::BufferR3<ffi::U8>;
using Numbers = ffi::Span<const int64_t>;

// A matrix of the parts from `begin` to `end`, each `[blocks, superblocks, bytes]`. `formats` has the
// format of each part, `runs` four numbers for each run: its part, first column, columns, and first
// block in the part.
ffi::ErrorOr<Matrix> matrix_of(ffi::RemainingArgs& parts, int64_t begin, int64_t end, Numbers formats,
                               Numbers runs) {
  const auto fail = [](const char* why) { return ffi::Unexpected(invalid(why)); };
  Matrix matrix;
  for (size_t i = 0; i + 4 <= runs.size(); i += 4) {
    const int64_t part = runs[i], column = runs[i + 1], count = runs[i + 2], first = runs[i + 3];
    if (part < begin || part >= end) continue;
    const auto weights = parts.get<Weights>(part);
    if (!weights) return fail("a part of the weights is not [blocks, superblocks, bytes]");
    const auto w = weights->dimensions();
    const BlockFormat& format = block_format(formats[part]);
    const int64_t spans = w[1] * (format.inputs / kSpan), blocks = (count + kBlock - 1) / kBlock;
    if (w[2] != format.bytes) return fail("a part of the weights has another layout");
    if (matrix.spans && matrix.spans != spans) return fail("parts have different inputs");
    if (column != matrix.outputs) return fail("runs are not in the order of their columns");
    if (first + blocks > w[0]) return fail("a part has more runs than blocks");
    matrix.runs.push_back({&format, weights->typed_data() + first * w[1] * w[2], column, count,
                           w[1] * w[2], matrix.blocks});
    matrix.spans = spans;
    matrix.blocks += blocks;
    matrix.outputs += count;
  }
  return matrix;
}

// `norm` and `residual` may be empty.
ffi::Error linear_call(ffi::ThreadPool pool, Table32 x, Vector32 norm, Table32 residual,
                       ffi::RemainingArgs parts, Numbers formats, Numbers runs, int64_t prologue,
                       float eps, ffi::Result<Table32> out) {
  const auto matrix = matrix_of(parts, 0, parts.size(), formats, runs);
  if (!matrix) return matrix.error();
  const int64_t rows = x.dimensions()[0];
  const int64_t width = x.dimensions()[1] / (prologue == Fusion::kSwiGlu ? 2 : 1);
  if (width > matrix->inputs() || out->dimensions()[0] != rows ||
      out->dimensions()[1] != matrix->outputs) {
    return invalid("x has more columns than the matrix, or the result another shape");
  }
  if (prologue == Fusion::kRmsNorm && static_cast<int64_t>(norm.element_count()) != width) {
    return invalid("the norm has another width than x");
  }
  if (residual.element_count() && residual.element_count() != out->element_count()) {
    return invalid("the residual has another shape than the result");
  }
  const Fusion fusion{static_cast<Fusion::Prologue>(prologue), norm.typed_data(), eps,
                      data_or_null(residual)};
  linear(pool, *matrix, fusion, x.typed_data(), rows, width, out->typed_data());
  return ffi::Error::Success();
}

// The first `gate_up_parts` parts are those of the first matrix.
ffi::Error feed_forward_call(ffi::ThreadPool pool, Table32 x, Vector32 norm, ffi::RemainingArgs parts,
                             Numbers formats, Numbers runs, int64_t gate_up_parts, float eps,
                             ffi::Result<Table32> out) {
  const auto up = matrix_of(parts, 0, gate_up_parts, formats, runs);
  if (!up) return up.error();
  const auto back = matrix_of(parts, gate_up_parts, parts.size(), formats, runs);
  if (!back) return back.error();
  const int64_t rows = out->dimensions()[0], width = out->dimensions()[1];
  if (up->outputs != 2 * back->inputs()) {
    return invalid("gates and ups must be of whole spans, and as many as the second matrix takes");
  }
  for (const Run& run : up->runs) {
    if (run.column % kBlock) return invalid("gates and ups must be in whole blocks");
  }
  if (x.dimensions()[0] != rows || x.dimensions()[1] != width || width > up->inputs() ||
      width != back->outputs || static_cast<int64_t>(norm.element_count()) != width) {
    return invalid("x, the norm and the result must be as wide as the matrices");
  }
  const Fusion fusion{Fusion::kRmsNorm, norm.typed_data(), eps, x.typed_data()};
  feed_forward(pool, *up, *back, fusion, x.typed_data(), rows, out->typed_data());
  return ffi::Error::Success();
}

// Rows of a table: `out[i]` are the weights of output `ids[i]`.
ffi::Error take_call(ffi::BufferR1<ffi::S32> ids, ffi::RemainingArgs parts, Numbers formats,
                     Numbers runs, ffi::Result<Table32> out) {
  const auto table = matrix_of(parts, 0, parts.size(), formats, runs);
  if (!table) return table.error();
  const int64_t count = ids.dimensions()[0];
  if (out->dimensions()[0] != count || out->dimensions()[1] != table->inputs() || !table->outputs) {
    return invalid("the result has another shape");
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t id = std::clamp<int64_t>(ids.typed_data()[i], 0, table->outputs - 1);
    const Block block = table->block_of(id);
    block.format->take(block.data, table->spans, id - block.column,
                       out->typed_data() + i * table->inputs());
  }
  return ffi::Error::Success();
}

}  // namespace quantized
}  // namespace

using namespace quantized;
XLA_FFI_DEFINE_HANDLER_SYMBOL(block_linear, linear_call,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Table32>()
                                  .Arg<Vector32>()
                                  .Arg<Table32>()
                                  .RemainingArgs()
                                  .Attr<Numbers>("formats")
                                  .Attr<Numbers>("runs")
                                  .Attr<int64_t>("prologue")
                                  .Attr<float>("eps")
                                  .Ret<Table32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(block_feed_forward, feed_forward_call,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Table32>()
                                  .Arg<Vector32>()
                                  .RemainingArgs()
                                  .Attr<Numbers>("formats")
                                  .Attr<Numbers>("runs")
                                  .Attr<int64_t>("gate_up_parts")
                                  .Attr<float>("eps")
                                  .Ret<Table32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(block_take, take_call,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::BufferR1<ffi::S32>>()
                                  .RemainingArgs()
                                  .Attr<Numbers>("formats")
                                  .Attr<Numbers>("runs")
                                  .Ret<Table32>());
