// Queries that share a KV head attend to chunks of 64 positions with an online softmax
// (arXiv:2205.14135). A chunk's keys and values are read into registers once for up to 6 queries.
//
// A query's result does not depend on the queries computed with it: it reads its positions in the
// same order, and masked positions add zeros.
#pragma once

#include <algorithm>
#include <cmath>

#include "paged_call.h"

namespace {
namespace paged {

constexpr int kChunk = 64;                      // positions of one step of the online softmax
constexpr int kTile = 6;                        // queries that share keys and values in registers
constexpr int kColumns = kLanes == 16 ? 4 : 2;  // vectors that share an operand
constexpr int kVectors = kChunk / kLanes;
constexpr int kMostQueries = 96, kQueryNumbers = 6144;  // of a block, which stays in cache
constexpr float kLowest = -1e30f;                       // finite, so that differences are numbers

// Up to 64 positions of one head: the addresses of each vector of them.
template <class F>
struct Chunk {
  const typename F::Stored *keys[kVectors], *values[kChunk / kBlock];
  const float *key_scales[kVectors], *value_scales[kVectors];
  int begin, live;

  Chunk(const Call& call, int row, int head, int begin, int end)
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

// Scores of M queries, [M][kChunk], for N vectors of positions from `first` on. This and mix_columns
// prefetch the next chunk at the pace at which they read this one.
template <class F, int M, int N>
void score_columns(const typename F::Operand* queries, int head_dim, const Chunk<F>& chunk,
                   const Chunk<F>& next, int first, float* scores) {
  Floats sums[M][N];
  UNROLL for (int m = 0; m < M; ++m) {
    UNROLL for (int n = 0; n < N; ++n) sums[m][n] = Floats{};
  }
  for (int d = 0; d < head_dim; d += F::kPack) {
    typename F::Packed keys[N];
    UNROLL for (int n = 0; n < N; ++n) {
      keys[n] = F::read(chunk.keys[first + n] + d * kBlock);
      prefetch(next.keys[first + n] + d * kBlock);
    }
    UNROLL for (int m = 0; m < M; ++m) F::multiply_add(sums[m], queries + m * head_dim + d, keys);
  }
  UNROLL for (int n = 0; n < N; ++n) {
    const Floats scale = F::kScaled ? load(chunk.key_scales[first + n]) : splat(1.0f);
    UNROLL for (int m = 0; m < M; ++m) {
      if (F::kScaled) sums[m][n] *= scale;
      store(scores + m * kChunk + (first + n) * kLanes, sums[m][n]);
    }
  }
}

// mixed = mixed * decay + weights x values, for M queries and N vectors of dimensions.
template <class F, int M, int N>
void mix_columns(const typename F::Operand* weights, const float* decay, const Chunk<F>& chunk,
                 const Chunk<F>& next, int live, int head_dim, int dim, float* mixed) {
  Floats sums[M][N];
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
        prefetch(ahead + at * head_dim + n * kLanes * F::kPack);
      }
      UNROLL for (int m = 0; m < M; ++m) {
        F::multiply_add(sums[m], weights + m * kChunk + begin + at, values);
      }
    }
    if (at < end) {  // half a pair; the other half is undefined
      UNROLL for (int n = 0; n < N; ++n) {
        values[n] = F::first_of_pair(F::read(from + at * head_dim + n * kLanes * F::kPack));
      }
      UNROLL for (int m = 0; m < M; ++m) {
        F::multiply_add(sums[m], weights + m * kChunk + begin + at, values);
      }
    }
  }
  UNROLL for (int m = 0; m < M; ++m) {
    UNROLL for (int n = 0; n < N; ++n) store(mixed + m * head_dim + dim + n * kLanes, sums[m][n]);
  }
}

// A block of queries of one row and KV head, and their state so far.
template <class F>
class Queries {
 public:
  Queries(const Call& call, int row, int head, int begin, int end)
      : call_(call), row_(row), head_(head), begin_(begin), count_(end - begin) {
    // Softmax is computed with powers of 2, so queries are divided by ln 2.
    const float factor = 1.44269504f / std::sqrt((float)call.head_dim);
    std::fill(mixed_, mixed_ + count_ * call.head_dim, 0.0f);
    float query[kMostDims];
    for (int i = 0; i < count_; ++i) {
      const int token = (begin + i) / call.group;
      state_[i] = {kLowest, call.last_seen(row, token), Floats{}};
      if (state_[i].last < 0) continue;
      length_ = std::max(length_, state_[i].last + 1);
      const float* from = call.entry(row, token, head, (begin + i) % call.group);
      call.rotated(from, row, token, factor, query);
      for (int d = 0; d < call.head_dim; d += kLanes) {
        store_rounded(operands_ + i * call.head_dim + d, load(query + d));
      }
    }
  }

  // Number of positions that any of them sees.
  int length() const { return length_; }

  // Attends to positions [begin, end), at most length(). `after` is the chunk that is read next.
  void attend(int begin, int end, const Chunk<F>& after) {
    for (; begin < end; begin += kChunk) {
      const Chunk<F> chunk(call_, row_, head_, begin, end);
      const bool more = begin + kChunk < end;
      const Chunk<F> next = more ? Chunk<F>(call_, row_, head_, begin + kChunk, end) : after;
      const Chunk<F>* ahead = &next;  // prefetched by the first tile only
      int i = 0;
      for (; i + 6 <= count_; i += 6, ahead = &chunk) tile<6>(i, chunk, *ahead);
      for (; i + 3 <= count_; i += 3, ahead = &chunk) tile<3>(i, chunk, *ahead);
      for (; i < count_; ++i, ahead = &chunk) tile<1>(i, chunk, *ahead);
    }
  }

  // Writes the results, after all positions have been attended to.
  void finish() const {
    for (int i = 0; i < count_; ++i) {
      const float total = reduce_add(state_[i].total);
      const float factor = total > 0 ? 1.0f / total : 0.0f;  // padding sees nothing
      float* to = call_.result(row_, begin_ + i, head_);
      const float* from = mixed_ + i * call_.head_dim;
      for (int d = 0; d < call_.head_dim; ++d) to[d] = from[d] * factor;
    }
  }

  // Numbers that a piece stores: the peak, the total and the mixed values of each query.
  static int piece_size(const Call& call) { return call.queries() * (call.head_dim + 2); }

  void store_piece(float* piece) const {
    for (int i = 0; i < count_; ++i, piece += call_.head_dim + 2) {
      piece[0] = state_[i].peak;
      piece[1] = reduce_add(state_[i].total);
      std::copy_n(mixed_ + i * call_.head_dim, call_.head_dim, piece + 2);
    }
  }

  // Writes the results of one row and KV head from all of its pieces.
  static void join(const Call& call, int row, int head, const float* pieces, int count) {
    const int stride = call.head_dim + 2;
    for (int i = 0; i < call.queries(); ++i) {
      const float* first = pieces + i * stride;
      float peak = kLowest, total = 0;
      for (int p = 0; p < count; ++p) peak = std::max(peak, first[p * piece_size(call)]);
      float* to = call.result(row, i, head);
      std::fill(to, to + call.head_dim, 0.0f);
      for (int p = 0; p < count; ++p) {
        const float* piece = first + p * piece_size(call);
        const float weight = exp2(piece[0] - peak);
        total += weight * piece[1];
        for (int d = 0; d < call.head_dim; ++d) to[d] += weight * piece[2 + d];
      }
      for (int d = 0; d < call.head_dim; ++d) to[d] /= total;
    }
  }

 private:
  struct State {
    float peak;
    int last;  // the last position that it sees
    Floats total;
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
    for (int m = 0; m < M; m += kLanes) store(decay + m, exp2(load(decay + m)));
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

  // Updates a query's peak with its scores, and masks those of positions that it must not see.
  static void raise_peak(State& state, int first, int vectors, float* scores) {
    const int seen = state.last - first;
    if (seen < vectors * kLanes - 1) {
      const Ints lane = lane_numbers();
      for (int v = 0; v < vectors; ++v) {
        const Floats score = load(scores + v * kLanes);
        store(scores + v * kLanes, lane + v * kLanes <= seen ? score : splat(kLowest));
      }
    }
    Floats peak = splat(state.peak);
    for (int v = 0; v < vectors; ++v) peak = max(peak, load(scores + v * kLanes));
    state.peak = reduce_max(peak);
  }

  // Computes a query's weights from its scores; those of masked positions are zeros.
  static void weigh(State& state, const Chunk<F>& chunk, int vectors, const float* scores,
                    typename F::Operand* weights) {
    const int seen = state.last - chunk.begin;
    const Ints lane = lane_numbers();
    for (int v = 0; v < vectors; ++v) {
      Floats weight = exp2(load(scores + v * kLanes) - state.peak);
      Floats scaled = F::kScaled ? weight * load(chunk.value_scales[v]) : weight;
      if (seen < (v + 1) * kLanes - 1) {
        const auto visible = lane + v * kLanes <= seen;
        weight = visible ? weight : Floats{};
        scaled = visible ? scaled : Floats{};
      }
      state.total += weight;
      store_rounded(weights + v * kLanes, scaled);
    }
  }

  const Call& call_;
  const int row_, head_, begin_, count_;
  int length_ = 0;
  State state_[kMostQueries];
  alignas(64) float mixed_[kQueryNumbers];
  alignas(64) typename F::Operand operands_[kQueryNumbers];
};

}  // namespace paged
}  // namespace
