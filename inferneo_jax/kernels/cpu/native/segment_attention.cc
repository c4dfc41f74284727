// Attention within segments that are stored one after the other: every token attends to all tokens
// of its own segment.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "binding.h"
#include "dense_tiles.h"
#include "pool.h"

namespace {
namespace dense {

using inferneo::share;

// Fewer multiplications than this wake no other thread.
constexpr int64_t kFewProducts = 100000;

template <class F>
struct Segments {
  using Number = typename F::Stored;

  const Number* fused;        // [tokens, 3, heads, dims]: queries, keys, values
  const int32_t* cu_seqlens;  // [segments + 1]: where each begins, and where the last one ends
  int64_t tokens, count, heads, dims;
  Number* out;  // [tokens, heads, dims]

  int64_t begin(int64_t segment) const { return std::clamp<int64_t>(cu_seqlens[segment], 0, tokens); }
  int64_t length(int64_t segment) const {
    return std::max<int64_t>(begin(segment + 1) - begin(segment), 0);
  }
  const Number* entry(int64_t token, int kind, int64_t head) const {
    return fused + ((token * 3 + kind) * heads + head) * dims;
  }
};

// A thread's memory, kept from call to call.
template <class F>
struct Scratch {
  std::vector<typename F::Stored> keys, values;
  std::vector<typename F::Operand> queries, weights;
  std::vector<float> scores;

  template <class T>
  static T* room(std::vector<T>& kept, int64_t size) {
    if ((int64_t)kept.size() < size) kept.resize(size);
    return kept.data();
  }
};

// Packs one head's keys as a matrix of dims x length, or its values as one of length x dims.
template <class F>
void pack_keys(const Segments<F>& segments, int64_t begin, int64_t length, int64_t head,
               typename F::Stored* to) {
  const int64_t dims = whole_packs<F>(segments.dims);
  std::fill_n(to, round_up(length, kOutputs) * dims, typename F::Stored{});
  for (int64_t k = 0; k < length; ++k) {
    const typename F::Stored* key = segments.entry(begin + k, 1, head);
    typename F::Stored* column = to + k / kOutputs * kOutputs * dims + k % kOutputs * F::kPack;
    int64_t d = 0;
    for (; d + F::kPack <= segments.dims; d += F::kPack) {
      std::memcpy(column + d * kOutputs, key + d, F::kPack * sizeof *key);
    }
    for (; d < segments.dims; ++d) column[d * kOutputs] = key[d];
  }
}

template <class F>
void pack_values(const Segments<F>& segments, int64_t begin, int64_t length, int64_t head,
                 typename F::Stored* to) {
  const int64_t positions = whole_packs<F>(length);
  std::fill_n(to, positions * round_up(segments.dims, kOutputs), typename F::Stored{});
  for (int64_t k = 0; k < length; ++k) {
    const typename F::Stored* value = segments.entry(begin + k, 2, head);
    for (int64_t first = 0; first < segments.dims; first += kOutputs) {
      typename F::Stored* row =
          to + first * positions + k / F::kPack * kOutputs * F::kPack + k % F::kPack;
      const int64_t count = std::min(kOutputs, segments.dims - first);
      for (int64_t d = 0; d < count; ++d) row[d * F::kPack] = value[first + d];
    }
  }
}

// Scores in units of ln 2 become softmax weights, but for the inverse of their sum, which is given.
template <class F>
float weigh(const float* scores, int64_t length, typename F::Operand* weights) {
  const int64_t whole = round_up(length, kLanes);
  Floats most = load(scores);
  for (int64_t k = kLanes; k < whole; k += kLanes) most = max(most, load(scores + k));
  const Floats largest = splat(reduce_max(most));
  Floats sums = {};
  for (int64_t k = 0; k < whole; k += kLanes) {
    Floats weight = exp2(load(scores + k) - largest);
    if (k + kLanes > length) weight = lane_numbers() < (int32_t)(length - k) ? weight : Floats{};
    sums += weight;
    store_rounded(weights + k, weight);
  }
  return 1.0f / reduce_add(sums);
}

// One head of one segment.
template <class F>
void attend_segment(const Segments<F>& segments, int64_t segment, int64_t head) {
  thread_local Scratch<F> scratch;
  const int64_t begin = segments.begin(segment), length = segments.length(segment), dims = segments.dims;
  const int64_t packed_dims = whole_packs<F>(dims), positions = whole_packs<F>(length);
  const int64_t width = round_up(length, kOutputs);
  auto* const keys = scratch.room(scratch.keys, width * packed_dims);
  auto* const values = scratch.room(scratch.values, positions * round_up(dims, kOutputs));
  auto* const queries = scratch.room(scratch.queries, kMostRows * packed_dims);
  auto* const weights = scratch.room(scratch.weights, kMostRows * width);
  auto* const scores = scratch.room(scratch.scores, kMostRows * width);
  pack_keys(segments, begin, length, head, keys);
  pack_values(segments, begin, length, head, values);
  const Floats factor = splat(1.44269504f / std::sqrt((float)dims));

  for (int64_t first = 0; first < length; first += kMostRows) {
    const int64_t rows = std::min<int64_t>(kMostRows, length - first);
    for (int64_t r = 0; r < rows; ++r) {
      put_operands<F>(segments.entry(begin + first + r, 0, head), dims, queries + r * packed_dims);
    }
    float totals[kMostRows][kOutputs];
    for (int64_t k = 0; k < width; k += kOutputs) {
      multiply_tile<F>(rows, queries, packed_dims, keys + k * packed_dims, packed_dims / F::kPack,
                       totals);
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t i = 0; i < kOutputs; i += kLanes) {
          store(scores + r * width + k + i, load(totals[r] + i) * factor);
        }
      }
    }
    float inverse[kMostRows];
    for (int64_t r = 0; r < rows; ++r) {
      float* const row = scores + r * width;
      // Behind the last key, up to a whole vector: no scores.
      std::fill(row + length, row + width, -INFINITY);
      inverse[r] = weigh<F>(row, length, weights + r * width);
    }
    for (int64_t d = 0; d < dims; d += kOutputs) {
      multiply_tile<F>(rows, weights, width, values + d * positions, positions / F::kPack, totals);
      const int64_t count = std::min(kOutputs, dims - d);
      for (int64_t r = 0; r < rows; ++r) {
        typename F::Stored* const to =
            segments.out + ((begin + first + r) * segments.heads + head) * dims + d;
        for (int64_t i = 0; i < kOutputs; i += kLanes) {
          store(totals[r] + i, load(totals[r] + i) * inverse[r]);
        }
        if (count == kOutputs) {
          for (int64_t i = 0; i < kOutputs; i += kLanes) store_rounded(to + i, load(totals[r] + i));
        } else {
          for (int64_t i = 0; i < count; ++i) store_rounded(to + i, totals[r][i]);
        }
      }
    }
  }
}

template <class F>
void attend_segments(xla::ffi::ThreadPool& pool, const Segments<F>& segments) {
  int64_t products = 0;
  for (int64_t segment = 0; segment < segments.count; ++segment) {
    products += segments.length(segment) * segments.length(segment) * segments.dims * segments.heads;
  }
  const auto work = [&](int64_t task) {
    const int64_t segment = task / segments.heads;
    if (segments.length(segment)) attend_segment(segments, segment, task % segments.heads);
  };
  const int64_t tasks = segments.count * segments.heads;
  if (products < kFewProducts) {
    for (int64_t task = 0; task < tasks; ++task) work(task);
  } else {
    share(pool, tasks, work);
  }
}

// --- Binding ---

using Ints32 = ffi::BufferR1<ffi::S32>;

// `fused` is [tokens, 3, heads, dims], `cu_seqlens` [segments + 1], `out` [tokens, heads, dims].
ffi::Error segments_call(ffi::ThreadPool pool, ffi::AnyBuffer fused, Ints32 cu_seqlens,
                         ffi::Result<ffi::AnyBuffer> out) {
  const auto f = fused.dimensions();
  if (f.size() != 4 || f[1] != 3 || out->element_count() * 3 != fused.element_count() ||
      out->element_type() != fused.element_type() || cu_seqlens.element_count() < 1) {
    return invalid("segments: fused must be [tokens, 3, heads, dims], cu_seqlens [segments + 1]");
  }
  const bool known = with_format(fused.element_type(), [&](auto format) {
    using F = decltype(format);
    using Number = typename F::Stored;
    attend_segments<F>(pool, {(const Number*)fused.untyped_data(), cu_seqlens.typed_data(), f[0],
                              (int64_t)cu_seqlens.element_count() - 1, f[2], f[3],
                              (Number*)out->untyped_data()});
  });
  return known ? ffi::Error::Success() : invalid("segments: neither float32 nor bfloat16");
}

auto segments_binding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<ffi::AnyBuffer>()
      .Arg<Ints32>()
      .Ret<ffi::AnyBuffer>();
}

}  // namespace dense
}  // namespace

using namespace dense;
XLA_FFI_DEFINE_HANDLER_SYMBOL(segment_attention, segments_call, segments_binding());
