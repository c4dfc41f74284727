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

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace inferneo {

// The compiler keeps an array of vectors in registers only where loops over it are unrolled early.
#define UNROLL _Pragma("GCC unroll 8")

constexpr int kBlock = 16;  // positions

// The compiler's own vectors, as wide as the CPU's registers.
#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Vector __attribute__((vector_size(kLanes * 4)));
typedef int32_t Integers __attribute__((vector_size(kLanes * 4)));
typedef int8_t Bytes __attribute__((vector_size(kLanes)));

template <class V = Vector>
inline V load(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class V>
inline void store(void* to, V v) {
  std::memcpy(to, &v, sizeof v);
}

inline Vector splat(float x) { return Vector{} + x; }

inline Vector max(Vector a, Vector b) { return a > b ? a : b; }

inline float max_of(Vector v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float most = v[0];
  for (int i = 1; i < kLanes; ++i) most = v[i] > most ? v[i] : most;
  return most;
#endif
}

inline float sum_of(Vector v) {
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}

// 2^x for x <= 0, to 2e-7 of it; what lies below 2^-125 becomes that. The fraction's power is a
// minimax polynomial; adding 1.5 * 2^23 rounds to a whole number and leaves it in the low bits, which
// then join the exponent.
inline Vector exp2_of(Vector x) {
  const Vector magic = splat(12582912.0f);
  x = max(x, splat(-125.0f));
  const Vector shifted = x + magic;
  const Vector f = x - (shifted - magic);
  Vector y = splat(1.3276472e-3f);
  y = y * f + 9.67554133e-3f;
  y = y * f + 5.55071327e-2f;
  y = y * f + 0.240221197f;
  y = y * f + 0.693146967f;
  y = y * f + 1.0f;
  return (Vector)((Integers)y + ((Integers)shifted << 23));
}

inline float exp2_of(float x) { return exp2_of(splat(x))[0]; }

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
// encode makes stored numbers of floats, and their scale where there is one. multiply_add adds to each lane the sum of its kPack products with kPack operands.

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
    UNROLL for (int n = 0; n < N; ++n) sums[n] += packed[n] * *operand;
  }
};

// Each position has a scale besides, which is applied to scores and to weights.
struct Int8 {
  using Stored = int8_t;
  using Operand = float;
  using Packed = Vector;
  static constexpr int kPack = 1;
  static constexpr bool kScaled = true;
  static Packed read(const Stored* from) {
#if defined(__AVX512F__)
    return (Vector)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load<__m128i>(from)));
#else
    return __builtin_convertvector(load<Bytes>(from), Vector);
#endif
  }
  static Packed first_of_pair(Packed v) { return v; }
  static void encode(const float* from, int count, Stored* to, float* scale) {
    float most = 1e-30f;
    for (int i = 0; i < count; ++i) most = std::fabs(from[i]) > most ? std::fabs(from[i]) : most;
    *scale = most / 127;
    for (int i = 0; i < count; ++i) to[i] = (Stored)std::nearbyint(from[i] / *scale);
  }
  static void put(Operand* to, Vector v) { store(to, v); }
  template <int N>
  static void multiply_add(Vector (&sums)[N], const Operand* operand, const Packed (&packed)[N]) {
    UNROLL for (int n = 0; n < N; ++n) sums[n] += packed[n] * *operand;
  }
};

#if defined(__AVX512BF16__)

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
      sums[n] += packed[n].first * operand[0];
      sums[n] += packed[n].second * operand[1];
    }
  }
};

#endif

}  // namespace inferneo
