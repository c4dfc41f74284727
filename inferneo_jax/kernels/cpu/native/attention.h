// Attention over paged keys and values: rotary embedding, writing and attending in one call.
//
// Only live pages are read, where they lie. Rows, KV heads and blocks of queries are shared out
// over threads. A single query would keep one core busy, so its positions are cut at every 256th;
// the pieces are joined in order by whoever ends last (https://pytorch.org/blog/flash-decoding).
// Cuts depend on a row's own length only, so neither other rows nor threads change a result.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "paged_queries.h"
#include "pool.h"

namespace {
namespace paged {

constexpr int kSplit = 256;  // positions of one piece
constexpr int kItems = 8;    // that a thread takes at a time where each has few queries

constexpr int kAlone = 200000;  // products of a query's numbers that wake no other thread
constexpr int kBlocks = 8;      // of queries, to keep all threads busy, if they can be cut so
constexpr int kCut = 4 * kTile;  // queries of the smallest block that is cut

// A block of queries of a row and KV head, or one piece of their positions; while keys are written,
// some tokens.
struct Item {
  int row, head, begin, end, piece, pieces;
  int64_t work;
};

// Calls each(item, the one after it or null) for all items, some at a time on one thread.
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

// Queries of one block: they and what they find stay in cache.
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
  if (block < queries) {  // the longest first, so that no thread is left alone with one at the end
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
    found.leave(first + item.piece * size);
    if (ended[head].fetch_add(1) == item.pieces - 1) {
      Queries<F>::join(call, item.row, item.head, first, item.pieces);
    }
  });
}

// A single token's key is written by who attends to its position; several tokens' come first.
template <class F>
void attention(xla::ffi::ThreadPool& pool, const Call& call) {
  const bool in_one_block = call.group < kCut && call.group <= most_queries(call);
  const bool at_once = call.tokens == 1 && call.group > 0 && in_one_block;
  if (call.writes() && !at_once) write_all<F>(pool, call);
  if (call.queries() > 0 && call.rows > 0) attend_all<F>(pool, call, call.writes() && at_once);
}

}  // namespace paged
}  // namespace
