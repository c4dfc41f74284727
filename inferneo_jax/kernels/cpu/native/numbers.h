// The number formats of matrices and of pages of keys and values, and how vectors of each are read
// and multiplied.
//
//   Stored   one number in memory
//   Operand  one number that it is multiplied by: of a row, a query or softmax weights
//   Packed   kLanes times kPack stored numbers, ready to be multiplied
//
// multiply_add adds to each lane the sum of its kPack products with kPack operands. encode makes
// stored numbers of floats, and their scale if there is one (kScaled).
//
// bfloat16 is packed in pairs: its dot product instruction takes them so, and a CPU without that
// widens a pair by a shift and a mask.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "simd.h"

namespace {

struct MultipliedAsFloat {
  using Operand = float;
  using Packed = simd::Floats;
  static constexpr int kPack = 1;
  static Packed first_of_pair(Packed v) { return v; }
  template <int N>
  static void multiply_add(simd::Floats (&sums)[N], const Operand* operand,
                           const Packed (&packed)[N]) {
    UNROLL for (int n = 0; n < N; ++n) sums[n] = simd::fma(packed[n], simd::splat(*operand), sums[n]);
  }
};

struct Float32 : MultipliedAsFloat {
  using Stored = float;
  static constexpr bool kScaled = false;
  static Packed read(const Stored* from) { return simd::load(from); }
  static void encode(const float* from, int count, Stored* to, float*) {
    std::memcpy(to, from, count * sizeof *to);
  }
};

// Numbers that share a scale, which their products are multiplied by.
struct Int8 : MultipliedAsFloat {
  using Stored = int8_t;
  static constexpr bool kScaled = true;
  static Packed read(const Stored* from) {
    return simd::widen(simd::load<simd::Vector<int8_t, simd::kLanes>>(from));
  }
  static void encode(const float* from, int count, Stored* to, float* scale) {
    float most = 1e-30f;
    for (int i = 0; i < count; ++i) most = std::fabs(from[i]) > most ? std::fabs(from[i]) : most;
    const float step = *scale = most / 127;
    for (int i = 0; i < count; ++i) to[i] = (Stored)std::nearbyint(from[i] / step);
  }
};

struct BFloat16 {
  using Stored = uint16_t;
  static constexpr int kPack = 2;
  static constexpr bool kScaled = false;
  // The count is a multiple of kLanes.
  static void encode(const float* from, int count, Stored* to, float*) {
    for (int i = 0; i < count; i += simd::kLanes) simd::store_rounded(to + i, simd::load(from + i));
  }

#if defined(__AVX512BF16__) && defined(__AVX512F__)
  using Operand = uint16_t;
  using Packed = __m512i;
  static Packed read(const Stored* from) { return _mm512_loadu_si512(from); }
  static Packed first_of_pair(Packed v) { return _mm512_and_si512(v, _mm512_set1_epi32(0xffff)); }
  template <int N>
  static void multiply_add(simd::Floats (&sums)[N], const Operand* operand,
                           const Packed (&packed)[N]) {
    const __m512i pair = _mm512_set1_epi32(simd::load<int32_t>(operand));
    UNROLL for (int n = 0; n < N; ++n) {
      sums[n] = (simd::Floats)_mm512_dpbf16_ps((__m512)sums[n], (__m512bh)pair, (__m512bh)packed[n]);
    }
  }
#else
  using Operand = float;
  struct Packed {
    simd::Floats first, second;
  };
  static Packed read(const Stored* from) {
    const auto pairs = simd::load<simd::Ints>(from);
    return {(simd::Floats)(pairs << 16), (simd::Floats)(pairs & ~0xffff)};
  }
  static Packed first_of_pair(Packed v) { return {v.first, simd::Floats{}}; }
  template <int N>
  static void multiply_add(simd::Floats (&sums)[N], const Operand* operand,
                           const Packed (&packed)[N]) {
    UNROLL for (int n = 0; n < N; ++n) {
      sums[n] = simd::fma(packed[n].first, simd::splat(operand[0]), sums[n]);
      sums[n] = simd::fma(packed[n].second, simd::splat(operand[1]), sums[n]);
    }
  }
#endif
};

// One number, widened, or rounded to what it is stored as.
inline float to_float(float x) { return x; }
inline float to_float(uint16_t x) { return simd::from_bfloat16(x); }
inline void store_rounded(float* to, float x) { *to = x; }
inline void store_rounded(uint16_t* to, float x) { *to = simd::to_bfloat16(x); }

}  // namespace
