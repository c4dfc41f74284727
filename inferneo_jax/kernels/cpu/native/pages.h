// How keys and values lie in pages, and how vectors of them are read, for each kind of number.
//
// Positions are kept in blocks of 16, so that scores of 16 keys are one vector of sums over
// head_dim and need no sums across lanes. For a block, one KV head, kPack numbers side by side:
//
//   keys    [head_dim / kPack][16][kPack]
//   values  [16 / kPack][head_dim][kPack]
//
// bfloat16 is packed in pairs: that is what its dot product instruction takes, and where there is
// none a pair is widened by a shift and a mask.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "wide.h"

namespace {
namespace paged {

using namespace wide;

constexpr int kBlock = 16;  // positions

// Round to nearest, ties to even.
inline uint16_t to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;  // NaN
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// A kind of number that pages hold.
//
//   Stored   one number of a page
//   Operand  one number that it is multiplied with: a query's, or a softmax weight
//   Packed   kLanes of kPack stored numbers, ready to be multiplied
//
// encode makes stored numbers of floats, and their scale where there is one. multiply_add adds to
// each lane the sum of its kPack products with kPack operands.

struct Float32 {
  using Stored = float;
  using Operand = float;
  using Packed = Vector;
  static constexpr int kPack = 1;
  static constexpr bool kScaled = false;
  static Packed read(const Stored* from) { return load(from); }
  static Packed first_of_pair(Packed v) { return v; }
  static void encode(const float* from, int count, Stored* to, float*) {
    std::memcpy(to, from, count * sizeof *to);
  }
  static void put(Operand* to, Vector v) { store(to, v); }
  template <int N>
  static void multiply_add(Vector (&sums)[N], const Operand* operand, const Packed (&packed)[N]) {
    UNROLL for (int n = 0; n < N; ++n) sums[n] = fma(packed[n], splat(*operand), sums[n]);
  }
};

// Each position has a scale besides, which is applied to scores and to weights.
struct Int8 {
  using Stored = int8_t;
  using Operand = float;
  using Packed = Vector;
  static constexpr int kPack = 1;
  static constexpr bool kScaled = true;
  static Packed read(const Stored* from) { return widen(load<Bytes>(from)); }
  static Packed first_of_pair(Packed v) { return v; }
  static void encode(const float* from, int count, Stored* to, float* scale) {
    float most = 1e-30f;
    for (int i = 0; i < count; ++i) most = std::fabs(from[i]) > most ? std::fabs(from[i]) : most;
    const float step = *scale = most / 127;
    for (int i = 0; i < count; ++i) to[i] = (Stored)std::nearbyint(from[i] / step);
  }
  static void put(Operand* to, Vector v) { store(to, v); }
  template <int N>
  static void multiply_add(Vector (&sums)[N], const Operand* operand, const Packed (&packed)[N]) {
    UNROLL for (int n = 0; n < N; ++n) sums[n] = fma(packed[n], splat(*operand), sums[n]);
  }
};

#if defined(__AVX512BF16__) && defined(__AVX512F__)

struct BFloat16 {
  using Stored = uint16_t;
  using Operand = uint16_t;
  using Packed = __m512i;
  static constexpr int kPack = 2;
  static constexpr bool kScaled = false;
  static Packed read(const Stored* from) { return _mm512_loadu_si512(from); }
  static Packed first_of_pair(Packed v) { return _mm512_and_si512(v, _mm512_set1_epi32(0xffff)); }
  static void encode(const float* from, int count, Stored* to, float*) {
    for (int i = 0; i < count; i += kLanes) put(to + i, load(from + i));
  }
  static void put(Operand* to, Vector v) { store(to, _mm512_cvtneps_pbh((__m512)v)); }
  template <int N>
  static void multiply_add(Vector (&sums)[N], const Operand* operand, const Packed (&packed)[N]) {
    const __m512i pair = _mm512_set1_epi32(load<int32_t>(operand));
    UNROLL for (int n = 0; n < N; ++n) {
      sums[n] = (Vector)_mm512_dpbf16_ps((__m512)sums[n], (__m512bh)pair, (__m512bh)packed[n]);
    }
  }
};

#else

struct BFloat16 {
  struct Packed {
    Vector first, second;
  };
  using Stored = uint16_t;
  using Operand = float;
  static constexpr int kPack = 2;
  static constexpr bool kScaled = false;
  static Packed read(const Stored* from) {
    const Integers pairs = load<Integers>(from);
    return {(Vector)(pairs << 16), (Vector)(pairs & ~0xffff)};
  }
  static Packed first_of_pair(Packed v) { return {v.first, Vector{}}; }
  static void encode(const float* from, int count, Stored* to, float*) {
    for (int i = 0; i < count; ++i) to[i] = to_bfloat16(from[i]);
  }
  static void put(Operand* to, Vector v) { store(to, v); }
  template <int N>
  static void multiply_add(Vector (&sums)[N], const Operand* operand, const Packed (&packed)[N]) {
    UNROLL for (int n = 0; n < N; ++n) {
      sums[n] = fma(packed[n].first, splat(operand[0]), sums[n]);
      sums[n] = fma(packed[n].second, splat(operand[1]), sums[n]);
    }
  }
};

#endif

}  // namespace paged
}  // namespace
