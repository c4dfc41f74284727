// Queries that share a KV head, over chunks of 64 positions under an online softmax
// (arXiv:2205.14135): each chunk's keys and values are read into registers for up to 6 queries.
//
// A query meets its positions in the same order whoever is computed with it, and what it may not
// see adds zeros: so its result is its own.
#pragma once

#include <algorithm>
#include <cmath>

#include "paged_call.h"

namespace {
namespace paged {

constexpr int kChunk = 64;                      // positions under one step of the online softmax
constexpr int kTile = 6;                        // queries that share what is read into registers
constexpr int kColumns = kLanes == 16 ? 4 : 2;  // vectors that share an operand
constexpr int kVectors = kChunk / kLanes;
constexpr int kMostQueries = 96, kQueryNumbers = 6144;  // of one block: they stay in cache
constexpr float kLowest = -1e30f;                       // finite: a difference of two is a number

// Up to 64 positions of one head: where each vector's worth of them lies.
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
      prefetch(next.keys[first + n] + d * kBlock);
    }
    UNROLL for (int m = 0; m < M; ++m) F::multiply_add(sums[m], queries + m * head_dim + d, keys);
  }
  UNROLL for (int n = 0; n < N; ++n) {
    const Vector scale = F::kScaled ? load(chunk.key_scales[first + n]) : splat(1.0f);
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
        prefetch(ahead + at * head_dim + n * kLanes * F::kPack);
      }
      UNROLL for (int m = 0; m < M; ++m) {
        F::multiply_add(sums[m], weights + m * kChunk + begin + at, values);
      }
    }
    if (at < end) {  // half a pair: what lies beyond may be anything
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

// Some queries of one row and KV head, and what they have found so far.
template <class F>
class Queries {
 public:
  Queries(const Call& call, int row, int head, int begin, int end)
      : call_(call), row_(row), head_(head), begin_(begin), count_(end - begin) {
    // Softmax is computed to the base of 2, whose logarithm goes into the queries.
    const float factor = 1.44269504f / std::sqrt((float)call.head_dim);
    std::fill(mixed_, mixed_ + count_ * call.head_dim, 0.0f);
    float query[kMostDims];
    for (int i = 0; i < count_; ++i) {
      const int token = (begin + i) / call.group;
      state_[i] = {kLowest, call.last_seen(row, token), Vector{}};
      if (state_[i].last < 0) continue;
      length_ = std::max(length_, state_[i].last + 1);
      const float* from = call.entry(row, token, head, (begin + i) % call.group);
      call.rotated(from, row, token, factor, query);
      for (int d = 0; d < call.head_dim; d += kLanes) {
        F::put(operands_ + i * call.head_dim + d, load(query + d));
      }
    }
  }

  // Positions that any of them sees.
  int length() const { return length_; }

  // Attends to the positions from begin on and before end, not beyond what any of them sees.
  // The chunk named will be read after these.
  void attend(int begin, int end, const Chunk<F>& after) {
    for (; begin < end; begin += kChunk) {
      const Chunk<F> chunk(call_, row_, head_, begin, end);
      const bool more = begin + kChunk < end;
      const Chunk<F> next = more ? Chunk<F>(call_, row_, head_, begin + kChunk, end) : after;
      const Chunk<F>* ahead = &next;  // for the first tile: once is enough
      int i = 0;
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
  static int piece_size(const Call& call) { return call.queries() * (call.head_dim + 2); }

  void leave(float* piece) const {
    for (int i = 0; i < count_; ++i, piece += call_.head_dim + 2) {
      piece[0] = state_[i].peak;
      piece[1] = sum_of(state_[i].total);
      std::copy_n(mixed_ + i * call_.head_dim, call_.head_dim, piece + 2);
    }
  }

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

  const Call& call_;
  const int row_, head_, begin_, count_;
  int length_ = 0;
  State state_[kMostQueries];
  alignas(64) float mixed_[kQueryNumbers];
  alignas(64) typename F::Operand operands_[kQueryNumbers];
};

}  // namespace paged
}  // namespace
