// One layer's call of paged attention: its arrays, their layout, and the writing of keys and values.
//
// Positions are stored in blocks of 16, so that scores of 16 keys are one vector of sums over
// head_dim and need no sums across lanes. For a block of one KV head, with kPack numbers side by side:
//
//   keys    [head_dim / kPack][16][kPack]
//   values  [16 / kPack][head_dim][kPack]
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "numbers.h"

namespace {
namespace paged {

using namespace simd;

constexpr int kBlock = 16;       // positions
constexpr int kMostDims = 1024;  // of a head

// Arrays are row-major; a missing one is null.
struct Call {
  int rows, tokens, kv_heads, group, head_dim, page_len, num_pages, max_pages;
  const float* fresh;  // [rows, tokens, kv_heads, entries, head_dim]
  int entries;         // the group's queries, then a key and a value if they are to be written
  const float *cos, *sin;            // [rows, tokens, head_dim / 2]: queries and keys are rotated
  const int32_t* block_tables;       // [rows, max_pages]
  const int32_t* positions;          // [rows, tokens]
  void *keys, *values;               // [pages, kv_heads, page_len, head_dim], in the layout above
  float *key_scales, *value_scales;  // [pages, kv_heads, page_len]
  float* out;                        // [rows, tokens, kv_heads, group, head_dim]

  bool writes() const { return entries > group; }

  int queries() const { return tokens * group; }  // of a row and KV head, token by token

  const float* entry(int row, int token, int head, int index) const {
    const int64_t at = ((int64_t)row * tokens + token) * kv_heads + head;
    return fresh + (at * entries + index) * head_dim;
  }

  float* result(int row, int query, int head) const {
    const int64_t token = (int64_t)row * tokens + query / group;
    return out + ((token * kv_heads + head) * group + query % group) * head_dim;
  }

  // The page that holds a position of a row; 0 where it has none.
  int page(int row, int position) const {
    const int index = position / page_len;
    if (position < 0 || index >= max_pages) return 0;
    return std::clamp(block_tables[(int64_t)row * max_pages + index], 0, num_pages - 1);
  }

  // Where a head's numbers begin in a page, counted in positions.
  int64_t place(int page, int head) const { return ((int64_t)page * kv_heads + head) * page_len; }

  // The last position that a token sees, which is its own; -1 for padding, which has no page.
  int last_seen(int row, int token) const {
    const int position = positions[(int64_t)row * tokens + token];
    return page(row, position) ? position : -1;
  }

  // Rotates a head's numbers by the token's angles, if there are any, and multiplies by a factor.
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

// Writes the keys and values of some tokens of one row and KV head into their pages.
template <class F>
void write_tokens(const Call& call, int row, int head, int begin, int end) {
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

}  // namespace paged
}  // namespace
