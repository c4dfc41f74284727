// Products with matrices of float32 or bfloat16, and what follows them: a bias, a residual, GELU or a
// layer normalisation.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <type_traits>
#include <vector>

#include "binding.h"
#include "dense_tiles.h"
#include "pool.h"

namespace {
namespace dense {

using inferneo::share;

// Rows that are multiplied by a block while it is in cache: whole tiles.
constexpr int64_t kNearRows = 96;
// Tasks that keep all threads busy to the end.
constexpr int64_t kTasks = 32;
// Fewer multiplications than this wake no other thread.
constexpr int64_t kAlone = 100000;

template <class F>
struct Matrix {
  const typename F::Stored* numbers;
  int64_t inputs, outputs;  // without padding

  int64_t blocks() const { return (outputs + kOutputs - 1) / kOutputs; }
  int64_t packs() const { return whole_packs<F>(inputs) / F::kPack; }
  const typename F::Stored* block(int64_t index) const {
    return numbers + index * packs() * F::kPack * kOutputs;
  }
};

// What follows a product, in this order; null leaves a step out.
struct Epilogue {
  const float* bias;      // [outputs]
  const float* residual;  // [rows, outputs]
  bool gelu;
  const float *scale, *shift;  // of a layer normalisation: [outputs]
  float eps;
};

// x * (1 + erf(x / sqrt(2))) / 2, with an error of at most 7e-7. Computed as max(x, 0) - |x| *
// tail(|x|), where tail is that of the normal distribution. Its logarithm is nearly a parabola,
// approximated by the polynomial of degree 5 that minimises the largest error of the result.
inline Floats gelu(Floats x) {
  const Floats size = max(x, -x);
  Floats y = splat(-4.73294116e-4f);
  y = fma(y, size, splat(7.08446186e-3f));
  y = fma(y, size, splat(-5.18271700e-2f));
  y = fma(y, size, splat(-0.459992647f));
  y = fma(y, size, splat(-1.15078783f));
  y = fma(y, size, splat(-1.00003767f));
  return fma(-size, exp2(y), max(x, Floats{}));
}

// (row - mean) / sqrt(variance + eps) * scale + shift, in place.
inline void layer_norm(float* row, int64_t size, const Epilogue& epilogue) {
  Floats sums = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) sums += load(row + i);
  float sum = reduce_add(sums);
  for (; i < size; ++i) sum += row[i];
  const float mean = sum / (float)size;
  sums = Floats{};
  for (i = 0; i + kLanes <= size; i += kLanes) {
    const Floats centred = load(row + i) - mean;
    sums = fma(centred, centred, sums);
  }
  sum = reduce_add(sums);
  for (; i < size; ++i) sum += (row[i] - mean) * (row[i] - mean);
  const float factor = 1.0f / std::sqrt(sum / (float)size + epilogue.eps);
  for (i = 0; i + kLanes <= size; i += kLanes) {
    const Floats normal = (load(row + i) - mean) * factor;
    store(row + i, fma(normal, load(epilogue.scale + i), load(epilogue.shift + i)));
  }
  for (; i < size; ++i) row[i] = (row[i] - mean) * factor * epilogue.scale[i] + epilogue.shift[i];
}

// Applies the epilogue to a row's products with one block, from `output` on, and stores them.
template <class Out>
inline void store_block(const Epilogue& epilogue, int64_t outputs, int64_t row, int64_t output,
                        float* __restrict totals, Out* out) {
  const int64_t place = row * outputs + output, count = std::min(outputs - output, kOutputs);
  if (epilogue.bias) {
    for (int64_t i = 0; i < count; ++i) totals[i] += epilogue.bias[output + i];
  }
  if (epilogue.residual) {
    for (int64_t i = 0; i < count; ++i) totals[i] += epilogue.residual[place + i];
  }
  if (epilogue.gelu) {
    for (int64_t i = 0; i < kOutputs; i += kLanes) store(totals + i, gelu(load(totals + i)));
  }
  if (count == kOutputs) {
    for (int64_t i = 0; i < kOutputs; i += kLanes) store_rounded(out + place + i, load(totals + i));
  } else {
    for (int64_t i = 0; i < count; ++i) store_rounded(out + place + i, totals[i]);
  }
}

// Rows as operands, with memory for a multiple of kFewRows: in place if possible, else a copy.
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

// `out = epilogue(x * matrix)` for the first `rows` rows of `total`: `x` is `[total, inputs]`, `out` is
// `[total, outputs]`, of floats if there is a layer normalisation.
//
// Work is divided by chunks of rows and parts of the blocks. The thread that completes the last part
// of a chunk normalises its rows.
template <class F, class X, class Out>
void linear(xla::ffi::ThreadPool& pool, const Matrix<F>& matrix, const Epilogue& epilogue, const X* x,
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
          store_block(epilogue, outputs, row + r, block * kOutputs, totals[r], out);
        }
      }
    }
  };
  const auto work = [&](int64_t task) {
    const int64_t chunk = task / parts, part = task % parts;
    const int64_t begin = chunk * kNearRows, end = std::min(rows, begin + kNearRows);
    multiply(begin, end, blocks * part / parts, blocks * (part + 1) / parts);
    if constexpr (std::is_same_v<Out, float>) {
      if (epilogue.scale && ended[chunk].fetch_add(1, std::memory_order_acq_rel) == parts - 1) {
        for (int64_t row = begin; row < end; ++row) layer_norm(out + row * outputs, outputs, epilogue);
      }
    }
  };
  if (alone) {
    for (int64_t chunk = 0; chunk < chunks; ++chunk) work(chunk);
  } else {
    share(pool, chunks * parts, work);
  }
}

// --- Bindings ---

using Vector32 = ffi::BufferR1<ffi::F32>;
using Table32 = ffi::BufferR2<ffi::F32>;
using Ints32 = ffi::BufferR1<ffi::S32>;

// `weights` is [outputs / 32, inputs / pack, 32, pack]; `live` is [1], the number of leading rows whose
// results are used. `bias`, `residual`, `scale` and `shift` may be empty.
ffi::Error linear_call(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer weights,
                              Vector32 bias, Table32 residual, Vector32 scale, Vector32 shift,
                              Ints32 live, int64_t gelu, float eps,
                              ffi::Result<ffi::AnyBuffer> out) {
  const auto xs = x.dimensions(), w = weights.dimensions(), o = out->dimensions();
  if (xs.size() != 2 || o.size() != 2 || o[0] != xs[0]) return invalid("x and result are no tables");
  const int64_t inputs = xs[1], outputs = o[1];
  if (w.size() != 4 || w[0] != round_up(outputs, kOutputs) / kOutputs || w[2] != kOutputs) {
    return invalid("the weights are not in blocks of the outputs");
  }
  const auto matches = [&](const Vector32& vector) {
    return !vector.element_count() || (int64_t)vector.element_count() == outputs;
  };
  const bool normal = scale.element_count() > 0;
  if (!matches(bias) || !matches(scale) || shift.element_count() != scale.element_count() ||
      (normal && out->element_type() != ffi::F32)) {
    return invalid("bias or norm do not fit the result");
  }
  if (residual.element_count() && residual.element_count() != out->element_count()) {
    return invalid("the residual has another shape than the result");
  }
  if (live.element_count() != 1) return invalid("live is not one number");
  const int64_t rows = std::clamp<int64_t>(*live.typed_data(), 0, xs[0]);
  const Epilogue epilogue{data_or_null(bias), data_or_null(residual), gelu != 0,
                          data_or_null(scale), data_or_null(shift),   eps};
  bool fits = true;
  const bool known = with_format(weights.element_type(), [&](auto format) {
    using F = decltype(format);
    fits = w[1] == whole_packs<F>(inputs) / F::kPack && w[3] == F::kPack;
    if (!fits) return;
    const Matrix<F> matrix{(const typename F::Stored*)weights.untyped_data(), inputs, outputs};
    fits = with_format(x.element_type(), [&](auto of_x) {
      fits = with_format(out->element_type(), [&](auto of_out) {
        linear(pool, matrix, epilogue, (const typename decltype(of_x)::Stored*)x.untyped_data(), rows,
               xs[0], (typename decltype(of_out)::Stored*)out->untyped_data());
      });
    }) && fits;
  });
  return known && fits ? ffi::Error::Success()
                       : invalid("the weights do not fit x, or a type is not supported");
}

auto linear_binding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Arg<Vector32>()
      .Arg<Table32>()
      .Arg<Vector32>()
      .Arg<Vector32>()
      .Arg<Ints32>()
      .Attr<int64_t>("gelu")
      .Attr<float>("eps")
      .Ret<ffi::AnyBuffer>();
}

}  // namespace dense
}  // namespace

using namespace dense;
XLA_FFI_DEFINE_HANDLER_SYMBOL(dense_linear, linear_call, linear_binding());
