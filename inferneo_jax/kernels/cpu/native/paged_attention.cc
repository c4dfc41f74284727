// Attention over paged keys and values: rotary embedding, writing and attending in one call.
//
// Only live pages are read, in place. Rows, KV heads and blocks of queries are shared out over
// threads. A single query would keep one core busy, so its positions are split at every 256th, and
// the thread that ends last joins the pieces in order (https://pytorch.org/blog/flash-decoding).
// Splits depend only on a row's own length, so neither other rows nor threads change a result.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "binding.h"
#include "paged_queries.h"
#include "pool.h"

namespace {
namespace paged {

using inferneo::share;

constexpr int kSplit = 256;  // positions of a piece
constexpr int kItems = 8;    // that a thread takes at a time if each has few queries

constexpr int kAlone = 200000;  // fewer multiplications than this wake no other thread
constexpr int kBlocks = 8;      // of queries, to keep all threads busy, if there are enough queries
constexpr int kCut = 4 * kTile;  // queries of the smallest block that is divided

// A block of queries of a row and KV head, or one piece of their positions; in write_all, some tokens.
struct Item {
  int row, head, begin, end, piece, pieces;
  int64_t work;
};

// Calls each(item, the next item or null) for all items; a thread takes `at_a_time` in a row.
template <class Each>
void share_items(xla::ffi::ThreadPool& pool, const std::vector<Item>& items, int at_a_time,
                 const Each& each) {
  int64_t work = 0;
  for (const Item& item : items) work += item.work;
  const int count = (int)items.size();
  if (work < kAlone) at_a_time = std::max(count, 1);
  share(pool, (count + at_a_time - 1) / at_a_time, [&](int64_t turn) {
    const int end = std::min(((int)turn + 1) * at_a_time, count);
    for (int i = (int)turn * at_a_time; i < end; ++i) {
      each(items[i], i + 1 < end ? &items[i + 1] : nullptr);
    }
  });
}

template <class F>
void write_all(xla::ffi::ThreadPool& pool, const Call& call) {
  std::vector<Item> items;
  for (int row = 0; row < call.rows; ++row) {
    for (int begin = 0; begin < call.tokens; begin += kChunk) {
      if (call.last_seen(row, begin) < 0) continue;
      const int end = std::min(begin + kChunk, call.tokens);
      for (int head = 0; head < call.kv_heads; ++head) {
        items.push_back({row, head, begin, end, 0, 1, (int64_t)(end - begin) * call.head_dim * 16});
      }
    }
  }
  share_items(pool, items, 1, [&](const Item& item, const Item*) {
    write_tokens<F>(call, item.row, item.head, item.begin, item.end);
  });
}

// Queries of one block, which stay in cache with their results.
inline int most_queries(const Call& call) {
  return std::clamp(kQueryNumbers / call.head_dim / kTile * kTile, 1, kMostQueries);
}

template <class F>
void attend_all(xla::ffi::ThreadPool& pool, const Call& call, bool writes) {
  const int queries = call.queries(), heads = call.rows * call.kv_heads;
  const int most = most_queries(call);
  std::vector<int> pieces(call.rows, 1);
  if (queries <= most) {
    for (int row = 0; row < call.rows; ++row) {
      for (int token = 0; token < call.tokens; ++token) {
        pieces[row] = std::max(pieces[row], call.last_seen(row, token) / kSplit + 1);
      }
    }
  }
  const int most_pieces = *std::max_element(pieces.begin(), pieces.end());
  int block = std::min(queries, most);
  const auto blocks = [&] { return (queries + block - 1) / block; };
  while (most_pieces == 1 && block >= kCut && heads * blocks() < kBlocks) {
    block = block / 2 / kTile * kTile;
  }

  std::vector<Item> items;
  for (int row = 0; row < call.rows; ++row) {
    for (int piece = 0; piece < pieces[row]; ++piece) {
      for (int head = 0; head < call.kv_heads; ++head) {
        for (int begin = 0; begin < queries; begin += block) {
          const int end = std::min(begin + block, queries);
          const int seen = call.last_seen(row, (end - 1) / call.group) + 1;
          const int positions = pieces[row] > 1 ? std::clamp(seen - piece * kSplit, 0, kSplit) : seen;
          const int64_t work = (int64_t)(end - begin) * positions * call.head_dim;
          items.push_back({row, head, begin, end, piece, pieces[row], work});
        }
      }
    }
  }
  if (block < queries) {  // the longest first, so that no thread is left with one at the end
    std::stable_sort(items.begin(), items.end(),
                     [](const Item& a, const Item& b) { return a.work > b.work; });
  }

  const int size = Queries<F>::piece_size(call);
  const int64_t numbers = most_pieces > 1 ? (int64_t)heads * most_pieces * size : 0;
  const std::unique_ptr<float[]> left(new float[numbers]);
  const std::unique_ptr<std::atomic<int>[]> ended(new std::atomic<int>[heads]());
  const int at_a_time = block < queries || (int)items.size() < 4 * kItems ? 1 : kItems;
  share_items(pool, items, at_a_time, [&](const Item& item, const Item* then) {
    const bool whole = item.pieces == 1;
    if (writes && item.piece == item.pieces - 1) write_tokens<F>(call, item.row, item.head, 0, 1);
    Queries<F> found(call, item.row, item.head, item.begin, item.end);
    const int begin = item.piece * kSplit;
    const int end = whole ? found.length() : std::min(found.length(), begin + kSplit);
    const Item& ahead = then ? *then : item;
    const int start = ahead.piece * kSplit;
    found.attend(begin, end, Chunk<F>(call, ahead.row, ahead.head, start, start + kChunk));
    if (whole) {
      found.finish();
      return;
    }
    const int head = item.row * call.kv_heads + item.head;
    float* first = left.get() + (int64_t)head * most_pieces * size;
    found.store_piece(first + item.piece * size);
    if (ended[head].fetch_add(1) == item.pieces - 1) {
      Queries<F>::join(call, item.row, item.head, first, item.pieces);
    }
  });
}

// A single token's key is written by the thread that attends to its position; those of several tokens
// are written first.
template <class F>
void attention(xla::ffi::ThreadPool& pool, const Call& call) {
  const bool in_one_block = call.group < kCut && call.group <= most_queries(call);
  const bool at_once = call.tokens == 1 && call.group > 0 && in_one_block;
  if (call.writes() && !at_once) write_all<F>(pool, call);
  if (call.queries() > 0 && call.rows > 0) attend_all<F>(pool, call, call.writes() && at_once);
}

// --- Bindings ---

using Array3 = ffi::BufferR3<ffi::F32>;
using Array5 = ffi::Buffer<ffi::F32, 5>;
using Table = ffi::BufferR2<ffi::S32>;

struct Pages {
  ffi::AnyBuffer keys, values, key_scales, value_scales;
};

// `fresh` is [rows, tokens, kv_heads, entries, head_dim]: a group's queries, then its key and value if
// they are to be written. Without angles ([0, 0, 0]) nothing is rotated.
ffi::Error run_call(ffi::ThreadPool& pool, int64_t group, const Array5& fresh,
                           const Array3& cos, const Array3& sin, const Table& block_tables,
                           const Table& positions, const Pages& pages, float* out) {
  const auto f = fresh.dimensions(), k = pages.keys.dimensions(), t = block_tables.dimensions();
  const auto at = positions.dimensions(), angles = cos.dimensions();
  const bool rotates = cos.element_count() > 0, scaled = pages.key_scales.element_count() > 0;
  if (k.size() != 4 || k[1] != f[2] || k[3] != f[4] || k[2] % kBlock ||
      k[3] % kBlock || k[3] > kMostDims) {
    return invalid("attention: pages must be [pages, kv_heads, 16 n, 16 m], m at most 64");
  }
  if (k[0] < 1 || t[0] != f[0] || at[0] != f[0] || at[1] != f[1]) {
    return invalid("attention: block tables must be [rows, max_pages], positions [rows, tokens]");
  }
  if (f[3] != group && f[3] != group + 2) return invalid("attention: entries must be the group's");
  if (rotates && (angles[0] != f[0] || angles[1] != f[1] || angles[2] * 2 != f[4])) {
    return invalid("attention: angles must be [rows, tokens, head_dim / 2]");
  }
  if (pages.values.element_count() != pages.keys.element_count() ||
      pages.values.element_type() != pages.keys.element_type() ||
      scaled != (pages.keys.element_type() == ffi::S8) ||
      (scaled && (int64_t)pages.key_scales.element_count() != k[0] * k[1] * k[2]) ||
      pages.value_scales.element_count() != pages.key_scales.element_count()) {
    return invalid("attention: values and scales must match the keys");
  }
  const auto size = [](int64_t n) { return static_cast<int>(n); };
  const Call call{
      size(f[0]), size(f[1]), size(f[2]), size(group), size(f[4]), size(k[2]), size(k[0]),
      size(t[1]), fresh.typed_data(), size(f[3]), rotates ? cos.typed_data() : nullptr,
      rotates ? sin.typed_data() : nullptr, block_tables.typed_data(), positions.typed_data(),
      pages.keys.untyped_data(), pages.values.untyped_data(),
      scaled ? pages.key_scales.typed_data<float>() : nullptr,
      scaled ? pages.value_scales.typed_data<float>() : nullptr, out};
  switch (pages.keys.element_type()) {
    case ffi::F32: attention<Float32>(pool, call); break;
    case ffi::BF16: attention<BFloat16>(pool, call); break;
    case ffi::S8: attention<Int8>(pool, call); break;
    default: return invalid("attention: pages must be of float32, bfloat16 or int8");
  }
  return ffi::Error::Success();
}

// Writes fresh keys and values into the pages, which are updated in place, and attends to the pages.
ffi::Error step_call(ffi::ThreadPool pool, Array5 fresh, Array3 cos, Array3 sin,
                            Table block_tables, Table positions, ffi::AnyBuffer keys,
                            ffi::AnyBuffer values, ffi::AnyBuffer key_scales,
                            ffi::AnyBuffer value_scales, ffi::Result<Array5> out,
                            ffi::Result<ffi::AnyBuffer> new_keys,
                            ffi::Result<ffi::AnyBuffer> new_values,
                            ffi::Result<ffi::AnyBuffer> new_key_scales,
                            ffi::Result<ffi::AnyBuffer> new_value_scales, int64_t group) {
  if (keys.untyped_data() != new_keys->untyped_data() ||
      values.untyped_data() != new_values->untyped_data() ||
      key_scales.untyped_data() != new_key_scales->untyped_data() ||
      value_scales.untyped_data() != new_value_scales->untyped_data()) {
    return invalid("attention: pages must be written in place");
  }
  return run_call(pool, group, fresh, cos, sin, block_tables, positions,
                  {keys, values, key_scales, value_scales}, out->typed_data());
}

// Attends to the pages without writing.
ffi::Error attend_call(ffi::ThreadPool pool, Array5 queries, Table block_tables, Table positions,
                       Array3 none, ffi::AnyBuffer keys, ffi::AnyBuffer values,
                       ffi::AnyBuffer key_scales, ffi::AnyBuffer value_scales,
                       ffi::Result<Array5> out) {
  const int64_t group = queries.dimensions()[3];
  return run_call(pool, group, queries, none, none, block_tables, positions,
                  {keys, values, key_scales, value_scales}, out->typed_data());
}

// Returns untouched pages: the system allocates memory as they are written, by huge pages of 2 MiB if
// it can, since the CPU's few address translations do not reach far over small ones.
ffi::Error pages_call(ffi::RemainingRets arrays, int64_t) {
#if defined(__linux__)
  constexpr uintptr_t kHuge = uintptr_t{1} << 21;
  for (size_t i = 0; i < arrays.size(); ++i) {
    auto array = arrays.get<ffi::AnyBuffer>(i);
    if (!array.has_value()) return array.error();
    const auto begin = reinterpret_cast<uintptr_t>((*array)->untyped_data());
    const uintptr_t first = (begin + kHuge - 1) & ~(kHuge - 1);
    const uintptr_t end = (begin + (*array)->size_bytes()) & ~(kHuge - 1);
    if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
  }
#endif
  return ffi::Error::Success();
}

auto step_binding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<Array5>()
      .Arg<Array3>()
      .Arg<Array3>()
      .Arg<Table>()
      .Arg<Table>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Ret<Array5>()
      .Ret<ffi::AnyBuffer>()
      .Ret<ffi::AnyBuffer>()
      .Ret<ffi::AnyBuffer>()
      .Ret<ffi::AnyBuffer>()
      .Attr<int64_t>("group");
}

auto attend_binding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<Array5>()
      .Arg<Table>()
      .Arg<Table>()
      .Arg<Array3>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Ret<Array5>();
}

auto pages_binding() { return ffi::Ffi::Bind().RemainingRets().Attr<int64_t>("layer"); }

}  // namespace paged
}  // namespace

using namespace paged;
XLA_FFI_DEFINE_HANDLER_SYMBOL(attention_step, step_call, step_binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(attention_attend, attend_call, attend_binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(attention_pages, pages_call, pages_binding());
