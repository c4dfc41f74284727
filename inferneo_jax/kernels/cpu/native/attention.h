// Attention over paged keys and values: rotary embedding, writing and attending in one call.
//
// Each row's live pages are read where they lie, 64 positions at a time under an online softmax
// (arXiv:2205.14135), for tiles of up to 6 queries that share a KV head. Which queries are computed
// together, and by which thread, changes no result: every query meets its positions in the same
// order, and what it may not see adds zeros.
//
// A single query would keep one core busy, so its positions are cut at every 256th; the pieces are
// joined in order by whoever ends last (https://pytorch.org/blog/flash-decoding).
#pragma once

#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "pages.h"

namespace inferneo {

constexpr int kChunk = 64;   // positions under one step of the online softmax
constexpr int kSplit = 256;  // positions of one piece
constexpr int kTile = 6;     // queries that share the keys read into registers
constexpr int kColumns = kLanes == 16 ? 4 : 2;  // vectors that share an operand
constexpr int kVectors = kChunk / kLanes;
constexpr int kMostDims = 1024;  // of a head
constexpr int kMostQueries = 96, kQueryNumbers = 6144;  // of one task: they stay in cache
constexpr int kItems = 8;  // rows and heads that a thread takes at a time while each has few queries
constexpr float kLowest = -1e30f;

// One layer's call. Arrays are row-major; an absent one is null.
struct AttentionCall {
  int rows, tokens, kv_heads, group, head_dim, page_len, num_pages, max_pages;
  const float* fresh;        // [rows, tokens, kv_heads, entries, head_dim]
  int entries;               // the group's queries, then a key and a value if they are to be written
  const float *cos, *sin;    // [rows, tokens, head_dim / 2]: fresh queries and keys are rotated
  const int32_t* tables;     // [rows, max_pages]
  const int32_t* positions;  // [rows, tokens]
  void *keys, *values;       // [pages, kv_heads, page_len, head_dim], as pages.h says
  float *key_scales, *value_scales;  // [pages, kv_heads, page_len]
  float* out;                // [rows, tokens, kv_heads, group, head_dim]

  bool writes() const { return entries > group; }
  int queries() const { return tokens * group; }
  const float* entry(int row, int token, int head, int index) const {
    return fresh + (((int64_t)(row * tokens + token) * kv_heads + head) * entries + index) * head_dim;
  }
  float* result(int row, int query, int head) const {
    const int64_t token = (int64_t)row * tokens + query / group;
    return out + ((token * kv_heads + head) * group + query % group) * head_dim;
  }
  // The page that holds a position of a row; 0 where it has none.
  int page(int row, int position) const {
    const int index = position / page_len;
    if (position < 0 || index >= max_pages) return 0;
    return std::clamp(tables[(int64_t)row * max_pages + index], 0, num_pages - 1);
  }
  // Where a head's numbers of a page begin, counted in positions.
  int64_t place(int page, int head) const { return ((int64_t)page * kv_heads + head) * page_len; }
  int last_seen(int row, int token) const {
    const int position = positions[(int64_t)row * tokens + token];
    return page(row, position) ? position : -1;
  }
  void rotated(const float* from, int row, int token, float factor, float* __restrict to) const {
    if (!cos) {
      for (int i = 0; i < head_dim; ++i) to[i] = from[i] * factor;
      return;
    }
    const int half = head_dim / 2;
    const float* c = cos + ((int64_t)row * tokens + token) * half;
    const float* s = sin + ((int64_t)row * tokens + token) * half;
    for (int i = 0; i < half; ++i) {
      const float low = from[i], high = from[half + i];
      to[i] = (low * c[i] - high * s[i]) * factor;
      to[half + i] = (high * c[i] + low * s[i]) * factor;
    }
  }
};

// Puts the keys and values of some tokens of one row into their places.
template <class F>
void write_tokens(const AttentionCall& call, int row, int head, int begin, int end) {
  using Stored = typename F::Stored;
  const int head_dim = call.head_dim;
  float key[kMostDims];
  Stored stored[kMostDims];
  for (int token = begin; token < end; ++token) {
    const int position = call.last_seen(row, token);
    if (position < 0) continue;
    const int within = position % call.page_len, offset = within % kBlock;
    const int64_t place = call.place(call.page(row, position), head);
    const int64_t block = (place + within - offset) * head_dim;

    call.rotated(call.entry(row, token, head, call.group), row, token, 1.0f, key);
    F::encode(key, head_dim, stored, call.key_scales + place + within);
    Stored* to = (Stored*)call.keys + block + offset * F::kPack;
    for (int d = 0; d < head_dim; d += F::kPack) {
      std::memcpy(to + d * kBlock, stored + d, F::kPack * sizeof(Stored));
    }

    F::encode(call.entry(row, token, head, call.group + 1), head_dim, stored,
              call.value_scales + place + within);
    to = (Stored*)call.values + block + offset / F::kPack * head_dim * F::kPack + offset % F::kPack;
    for (int d = 0; d < head_dim; ++d) to[d * F::kPack] = stored[d];
  }
}

// Up to 64 positions of one head: where each vector's worth of them lies.
template <class F>
struct Chunk {
  const typename F::Stored *keys[kVectors], *values[kChunk / kBlock];
  const float *key_scales[kVectors], *value_scales[kVectors];
  int begin, live;

  Chunk(const AttentionCall& call, int row, int head, int begin, int end)
      : begin(begin), live(std::min(kChunk, end - begin)) {
    for (int at = 0; at < kChunk; at += kBlock) {
      const int position = begin + std::min(at, (live - 1) / kBlock * kBlock);
      const int64_t place = call.place(call.page(row, position), head) + position % call.page_len;
      const int64_t block = place * call.head_dim;
      values[at / kBlock] = (const typename F::Stored*)call.values + block;
      for (int lane = 0; lane < kBlock; lane += kLanes) {
        const int vector = (at + lane) / kLanes;
        keys[vector] = (const typename F::Stored*)call.keys + block + lane * F::kPack;
        if (F::kScaled) {
          key_scales[vector] = call.key_scales + place + lane;
          value_scales[vector] = call.value_scales + place + lane;
        }
      }
    }
  }
};

// Scores of M queries, [M][kChunk], against N vectors of positions from the given one on. Both
// this and mix_columns ask memory for the chunk that comes next at the pace at which they read.
template <class F, int M, int N>
void score_columns(const typename F::Operand* queries, int head_dim, const Chunk<F>& chunk,
                   const Chunk<F>& next, int first, float* scores) {
  Vector sums[M][N];
  UNROLL for (int m = 0; m < M; ++m) {
    UNROLL for (int n = 0; n < N; ++n) sums[m][n] = Vector{};
  }
  for (int d = 0; d < head_dim; d += F::kPack) {
    typename F::Packed keys[N];
    UNROLL for (int n = 0; n < N; ++n) {
      keys[n] = F::read(chunk.keys[first + n] + d * kBlock);
      __builtin_prefetch(next.keys[first + n] + d * kBlock);
    }
    UNROLL for (int m = 0; m < M; ++m) F::multiply_add(sums[m], queries + m * head_dim + d, keys);
  }
  UNROLL for (int n = 0; n < N; ++n) {
    const Vector scale = F::kScaled ? load(chunk.key_scales[first + n]) : splat(1.0f);
    UNROLL for (int m = 0; m < M; ++m) {
      store(scores + m * kChunk + (first + n) * kLanes, F::kScaled ? sums[m][n] * scale : sums[m][n]);
    }
  }
}

// mixed = mixed * decay + weights x values, for M queries and N vectors of dimensions.
template <class F, int M, int N>
void mix_columns(const typename F::Operand* weights, const float* decay, const Chunk<F>& chunk,
                 const Chunk<F>& next, int live, int head_dim, int dim, float* mixed) {
  Vector sums[M][N];
  UNROLL for (int m = 0; m < M; ++m) {
    UNROLL for (int n = 0; n < N; ++n) {
      sums[m][n] = load(mixed + m * head_dim + dim + n * kLanes) * decay[m];
    }
  }
  for (int begin = 0; begin < live; begin += kBlock) {
    const typename F::Stored* from = chunk.values[begin / kBlock] + dim * F::kPack;
    const typename F::Stored* ahead = next.values[begin / kBlock] + dim * F::kPack;
    const int end = std::min(kBlock, live - begin);
    int at = 0;
    typename F::Packed values[N];
    for (; at + F::kPack <= end; at += F::kPack) {
      UNROLL for (int n = 0; n < N; ++n) {
        values[n] = F::read(from + at * head_dim + n * kLanes * F::kPack);
        __builtin_prefetch(ahead + at * head_dim + n * kLanes * F::kPack);
      }
      UNROLL for (int m = 0; m < M; ++m) F::multiply_add(sums[m], weights + m * kChunk + begin + at, values);
    }
    if (at < end) {  // half a pair: what lies beyond may be anything
      UNROLL for (int n = 0; n < N; ++n) {
        values[n] = F::first_of_pair(F::read(from + at * head_dim + n * kLanes * F::kPack));
      }
      UNROLL for (int m = 0; m < M; ++m) F::multiply_add(sums[m], weights + m * kChunk + begin + at, values);
    }
  }
  UNROLL for (int m = 0; m < M; ++m) {
    UNROLL for (int n = 0; n < N; ++n) store(mixed + m * head_dim + dim + n * kLanes, sums[m][n]);
  }
}

// Some queries of one row and KV head, and what they have found so far.
template <class F>
class Queries {
 public:
  Queries(const AttentionCall& call, int row, int head, int begin, int end)
      : call_(call), row_(row), head_(head), begin_(begin), count_(end - begin) {
    // Softmax is computed to the base of 2, whose logarithm goes into the queries.
    const float factor = 1.44269504f / std::sqrt((float)call.head_dim);
    std::fill(mixed_, mixed_ + count_ * call.head_dim, 0.0f);
    float query[kMostDims];
    for (int i = 0; i < count_; ++i) {
      const int token = (begin + i) / call.group;
      const float* from = call.entry(row, token, head, (begin + i) % call.group);
      call.rotated(from, row, token, factor, query);
      for (int d = 0; d < call.head_dim; d += kLanes) {
        F::put(operands_ + i * call.head_dim + d, load(query + d));
      }
      state_[i] = {kLowest, call.last_seen(row, token), Vector{}};
    }
  }

  // Positions that any of them sees.
  int length() const {
    int last = -1;
    for (int i = 0; i < count_; ++i) last = std::max(last, state_[i].last);
    return last + 1;
  }

  // Attends to the positions from begin on and before end, not beyond what any of them sees.
  // Another chunk may be named that will be read after these.
  void attend(int begin, int end, const Chunk<F>* after) {
    for (; begin < end; begin += kChunk) {
      const Chunk<F> chunk(call_, row_, head_, begin, end);
      const bool more = begin + kChunk < end;
      const Chunk<F> next = more ? Chunk<F>(call_, row_, head_, begin + kChunk, end) : after ? *after : chunk;
      int i = 0;
      const Chunk<F>* ahead = &next;  // once is enough
      for (; i + 6 <= count_; i += 6, ahead = &chunk) tile<6>(i, chunk, *ahead);
      for (; i + 3 <= count_; i += 3, ahead = &chunk) tile<3>(i, chunk, *ahead);
      for (; i < count_; ++i, ahead = &chunk) tile<1>(i, chunk, *ahead);
    }
  }

  // Writes the results, where all positions have been attended to.
  void finish() const {
    for (int i = 0; i < count_; ++i) {
      const float total = sum_of(state_[i].total);
      const float factor = total > 0 ? 1.0f / total : 0.0f;  // no query sees nothing but padding
      float* to = call_.result(row_, begin_ + i, head_);
      const float* from = mixed_ + i * call_.head_dim;
      for (int d = 0; d < call_.head_dim; ++d) to[d] = from[d] * factor;
    }
  }

  // Numbers that a piece leaves behind: of each query its peak, its total, and what it mixed.
  static int piece_size(const AttentionCall& call) { return call.queries() * (call.head_dim + 2); }

  void leave(float* piece) const {
    for (int i = 0; i < count_; ++i, piece += call_.head_dim + 2) {
      piece[0] = state_[i].peak;
      piece[1] = sum_of(state_[i].total);
      std::copy_n(mixed_ + i * call_.head_dim, call_.head_dim, piece + 2);
    }
  }

  static void join(const AttentionCall& call, int row, int head, const float* pieces, int count) {
    const int stride = call.head_dim + 2;
    for (int i = 0; i < call.queries(); ++i) {
      const float* first = pieces + i * stride;
      float peak = kLowest, total = 0;
      for (int p = 0; p < count; ++p) peak = std::max(peak, first[p * piece_size(call)]);
      float* to = call.result(row, i, head);
      std::fill(to, to + call.head_dim, 0.0f);
      for (int p = 0; p < count; ++p) {
        const float* piece = first + p * piece_size(call);
        const float weight = exp2_of(piece[0] - peak);
        total += weight * piece[1];
        for (int d = 0; d < call.head_dim; ++d) to[d] += weight * piece[2 + d];
      }
      for (int d = 0; d < call.head_dim; ++d) to[d] /= total;
    }
  }

 private:
  struct State {
    float peak;
    int last;  // position that it sees last
    Vector total;
  };

  template <int M>
  void tile(int i, const Chunk<F>& chunk, const Chunk<F>& next) {
    const int head_dim = call_.head_dim;
    int last = -1;
    for (int m = 0; m < M; ++m) last = std::max(last, state_[i + m].last);
    const int live = std::min(chunk.live, last + 1 - chunk.begin);
    if (live <= 0) return;
    const int vectors = (live + kLanes - 1) / kLanes;

    alignas(64) float scores[M * kChunk];
    const typename F::Operand* queries = operands_ + i * head_dim;
    for (int v = 0; v < vectors; v += kColumns) {
      switch (std::min(vectors - v, kColumns)) {
        case 1: score_columns<F, M, 1>(queries, head_dim, chunk, next, v, scores); break;
        case 2: score_columns<F, M, 2>(queries, head_dim, chunk, next, v, scores); break;
        default: score_columns<F, M, kColumns>(queries, head_dim, chunk, next, v, scores);
      }
    }

    alignas(64) typename F::Operand weights[M * kChunk];
    alignas(64) float decay[16] = {};
    for (int m = 0; m < M; ++m) {
      State& state = state_[i + m];
      decay[m] = state.peak;
      raise_peak(state, chunk.begin, vectors, scores + m * kChunk);
      decay[m] -= state.peak;
    }
    for (int m = 0; m < M; m += kLanes) store(decay + m, exp2_of(load(decay + m)));
    for (int m = 0; m < M; ++m) {
      state_[i + m].total *= decay[m];
      weigh(state_[i + m], chunk, vectors, scores + m * kChunk, weights + m * kChunk);
    }

    float* mixed = mixed_ + i * head_dim;
    int dim = 0;
    for (; dim + kColumns * kLanes <= head_dim; dim += kColumns * kLanes) {
      mix_columns<F, M, kColumns>(weights, decay, chunk, next, live, head_dim, dim, mixed);
    }
    for (; dim < head_dim; dim += kLanes) {
      mix_columns<F, M, 1>(weights, decay, chunk, next, live, head_dim, dim, mixed);
    }
  }

  static Integers lane_numbers() {
    Integers lane;
    for (int i = 0; i < kLanes; ++i) lane[i] = i;
    return lane;
  }

  // Takes a query's scores into its peak; those that it may not see become the lowest.
  static void raise_peak(State& state, int first, int vectors, float* scores) {
    const int seen = state.last - first;
    if (seen < vectors * kLanes - 1) {
      const Integers lane = lane_numbers();
      for (int v = 0; v < vectors; ++v) {
        const Vector score = load(scores + v * kLanes);
        store(scores + v * kLanes, lane + v * kLanes <= seen ? score : splat(kLowest));
      }
    }
    Vector peak = splat(state.peak);
    for (int v = 0; v < vectors; ++v) peak = max(peak, load(scores + v * kLanes));
    state.peak = max_of(peak);
  }

  // A query's weights from its scores; zeros for what it may not see.
  static void weigh(State& state, const Chunk<F>& chunk, int vectors, const float* scores,
                    typename F::Operand* weights) {
    const int seen = state.last - chunk.begin;
    const Integers lane = lane_numbers();
    for (int v = 0; v < vectors; ++v) {
      Vector weight = exp2_of(load(scores + v * kLanes) - state.peak);
      Vector scaled = F::kScaled ? weight * load(chunk.value_scales[v]) : weight;
      if (seen < (v + 1) * kLanes - 1) {
        const auto visible = lane + v * kLanes <= seen;
        weight = visible ? weight : Vector{};
        scaled = visible ? scaled : Vector{};
      }
      state.total += weight;
      F::put(weights + v * kLanes, scaled);
    }
  }

  const AttentionCall& call_;
  const int row_, head_, begin_, count_;
  State state_[kMostQueries];
  alignas(64) float mixed_[kQueryNumbers];
  alignas(64) typename F::Operand operands_[kQueryNumbers];
};

// One query block or piece of a row and KV head; while keys are written, some of its tokens.
struct AttentionItem {
  int row, head, begin, end, piece, pieces, work;
};

// parallel(count, work, f) calls f(0) to f(count - 1), each once, on any thread, and waits.
template <class F, class Parallel>
void attention(const AttentionCall& call, const Parallel& parallel) {
  std::vector<AttentionItem> items;
  const auto run = [&](int at_a_time, const auto& each) {
    int64_t work = 0;
    for (const AttentionItem& item : items) work += item.work;
    const int count = (int)items.size();
    parallel((count + at_a_time - 1) / at_a_time, work, [&](int turn) {
      const int end = std::min((turn + 1) * at_a_time, count);
      for (int i = turn * at_a_time; i < end; ++i) {
        each(items[i], i + 1 < end ? &items[i + 1] : nullptr);
      }
    });
  };

  // A single token's key is written by who attends to its position; several tokens' come first.
  const int most = std::clamp(kQueryNumbers / call.head_dim / kTile * kTile, 1, kMostQueries);
  const bool at_once = call.tokens == 1 && 0 < call.group && call.group <= most;
  if (call.writes() && !at_once) {
    for (int row = 0; row < call.rows; ++row) {
      for (int begin = 0; begin < call.tokens; begin += kChunk) {
        if (call.last_seen(row, begin) < 0) continue;
        const int end = std::min(begin + kChunk, call.tokens);
        for (int head = 0; head < call.kv_heads; ++head) {
          items.push_back({row, head, begin, end, 0, 0, (end - begin) * call.head_dim * 8});
        }
      }
    }
    run(1, [&](const AttentionItem& item, const AttentionItem*) {
      write_tokens<F>(call, item.row, item.head, item.begin, item.end);
    });
    items.clear();
  }
  if (call.group == 0) return;

  // All that is known of a row's length here is known of it alone: so are its pieces.
  const int queries = call.queries();
  int most_pieces = 1;
  for (int row = 0; row < call.rows; ++row) {
    int length = 0;
    for (int token = 0; token < call.tokens; ++token) {
      length = std::max(length, call.last_seen(row, token) + 1);
    }
    const int pieces = queries <= most ? std::max((length + kSplit - 1) / kSplit, 1) : 1;
    most_pieces = std::max(most_pieces, pieces);
    for (int piece = 0; piece < pieces; ++piece) {
      const int positions = pieces > 1 ? std::min(kSplit, length - piece * kSplit) : length;
      for (int head = 0; head < call.kv_heads; ++head) {
        for (int begin = 0; begin < queries; begin += most) {
          const int end = std::min(begin + most, queries);
          const int seen = queries <= most ? positions : call.last_seen(row, (end - 1) / call.group);
          items.push_back({row, head, begin, end, piece, pieces, (end - begin) * seen * call.head_dim});
        }
      }
    }
  }
  const bool large = queries > most;
  if (large) {  // the longest first, so that no core is left alone with one at the end
    std::stable_sort(items.begin(), items.end(), [](const auto& a, const auto& b) {
      return a.work > b.work;
    });
  }

  const int heads = call.rows * call.kv_heads, size = Queries<F>::piece_size(call);
  const int64_t numbers = most_pieces > 1 ? (int64_t)heads * most_pieces * size : 0;
  const std::unique_ptr<float[]> left(new float[numbers]);
  const std::unique_ptr<std::atomic<int>[]> ended(new std::atomic<int>[heads]());
  run(large || (int)items.size() < 4 * kItems ? 1 : kItems, [&](const auto& item, const auto* then) {
    const int begin = item.piece * kSplit;
    Queries<F> found(call, item.row, item.head, item.begin, item.end);
    const int end = item.pieces > 1 ? std::min(found.length(), begin + kSplit) : found.length();
    if (call.writes() && at_once && item.piece == item.pieces - 1) {
      write_tokens<F>(call, item.row, item.head, 0, 1);
    }
    const int start = then ? then->piece * kSplit : 0;
    const Chunk<F> after(call, then ? then->row : item.row, then ? then->head : item.head,
                         then ? start : 0, then ? start + kChunk : kChunk);
    found.attend(begin, end, then ? &after : nullptr);
    if (item.pieces == 1) {
      found.finish();
      return;
    }
    const int head = item.row * call.kv_heads + item.head;
    float* pieces = left.get() + (int64_t)head * most_pieces * size;
    found.leave(pieces + item.piece * size);
    if (ended[head].fetch_add(1) == item.pieces - 1) {
      Queries<F>::join(call, item.row, item.head, pieces, item.pieces);
    }
  });
}

}  // namespace inferneo
