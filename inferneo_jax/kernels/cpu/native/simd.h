// Vectors for all kernels, in the compiler's own vector types: one source for all instruction sets.
//
// A multiplication and an addition are fused only where fma() says so (-ffp-contract=off). Vectors
// that may be wider than the CPU's registers are passed by reference: how they are passed by value
// differs between compilers and their options.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

// The compiler keeps an array of vectors in registers only if loops over it are unrolled early.
#define UNROLL _Pragma("GCC unroll 8")

namespace {
namespace simd {

template <class T, int N>
struct VectorOf {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};
template <class T, int N>
using Vector = typename VectorOf<T, N>::type;

// Floats in a register.
#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
using Floats = Vector<float, kLanes>;
using Ints = Vector<int32_t, kLanes>;

// 16 lanes on every CPU: where lanes are summed up, results are the same bits on all of them.
using Floats16 = Vector<float, 16>;
using Ints16 = Vector<int32_t, 16>;
using Bits16 = Vector<uint32_t, 16>;

template <class V = Floats>
inline V load(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

inline void load16(const float* from, Floats16& to) { std::memcpy(&to, from, sizeof to); }

// The first `count` of 16 floats, and zeros after them.
inline void load_some(const float* from, int64_t count, Floats16& to) {
  to = Floats16{};
  std::memcpy(&to, from, std::clamp<int64_t>(count, 0, 16) * sizeof *from);
}

template <class V>
inline void store(void* to, const V& v) {
  std::memcpy(to, &v, sizeof v);
}

template <class V = Floats>
inline V splat(float x) {
  return x - V{};  // not x + V{}, which is 0 for -0
}

inline Floats max(Floats a, Floats b) { return a > b ? a : b; }

// a * b + c
template <class V>
inline V fma(const V& a, const V& b, const V& c) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#endif
#if defined(__AVX2__) && defined(__FMA__)
  if constexpr (sizeof(V) == 32) return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#endif
  return a * b + c;
}

// Requests a line that is read soon. Not into the first level of cache, whose few outstanding
// misses would be the limit (10 against 17 GB/s on one core of Zen 4).
inline void prefetch(const void* at) { __builtin_prefetch(at, 0, 2); }

// 0, 1, 2, ...
inline Ints lane_numbers() {
  Ints lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane;
}

inline float reduce_max(Floats v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float most = v[0];
  for (int i = 1; i < kLanes; ++i) most = v[i] > most ? v[i] : most;
  return most;
#endif
}

inline int32_t reduce_max(const Ints16& v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_epi32((__m512i)v);
#else
  int32_t most = v[0];
  for (int i = 1; i < 16; ++i) most = std::max(most, v[i]);
  return most;
#endif
}

// From the first lane to the last.
template <class V>
inline float reduce_add(const V& v) {
  float sum = 0;
  for (size_t i = 0; i < sizeof v / sizeof sum; ++i) sum += v[i];
  return sum;
}

inline int32_t reduce_add(const Bits16& v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_epi32((__m512i)v);
#else
  uint32_t sum = 0;
  for (int i = 0; i < 16; ++i) sum += v[i];
  return static_cast<int32_t>(sum);
#endif
}

// 2^x for x <= 126, with a relative error of at most 2e-7; below 2^-125 the result is that. The
// power of the fraction is a minimax polynomial; adding 1.5 * 2^23 rounds to an integer and leaves
// it in the low bits, which then join the exponent.
inline Floats exp2(Floats x) {
  const Floats magic = splat(12582912.0f);
  x = max(x, splat(-125.0f));
  const Floats shifted = x + magic;
  const Floats f = x - (shifted - magic);
  Floats y = splat(1.3276472e-3f);
  y = fma(y, f, splat(9.67554133e-3f));
  y = fma(y, f, splat(5.55071327e-2f));
  y = fma(y, f, splat(0.240221197f));
  y = fma(y, f, splat(0.693146967f));
  y = fma(y, f, splat(1.0f));
  return (Floats)((Ints)y + ((Ints)shifted << 23));
}

inline float exp2(float x) { return exp2(splat(x))[0]; }

// --- Conversions ---

inline Floats widen(const Vector<int8_t, kLanes>& v) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)v));
#elif defined(__AVX2__)
  return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128((int64_t)v)));
#else
  return __builtin_convertvector(v, Floats);
#endif
}

// The low byte of each lane.
inline void store_bytes(const Bits16& v, int8_t* to) {
#if defined(__AVX512F__)
  store(to, _mm512_cvtepi32_epi8((__m512i)v));
#else
  store(to, __builtin_convertvector((Ints16)v, Vector<int8_t, 16>));
#endif
}

inline float from_float16(uint16_t half) {
  // Its exponent and fraction, read as those of a float, are 2^112 times too small.
  const uint32_t bits = (half & 0x7fffu) << 13 | (half & 0x8000u) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value * 5.192296858534828e33f;
}

inline float from_bfloat16(uint16_t x) {
  const uint32_t bits = (uint32_t)x << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Rounds to nearest, ties to even.
inline uint16_t to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;  // NaN
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Stores kLanes floats, as they are or rounded to bfloat16.
inline void store_rounded(float* to, Floats v) { store(to, v); }
inline void store_rounded(uint16_t* to, Floats v) {
#if defined(__AVX512BF16__) && defined(__AVX512F__)
  store(to, _mm512_cvtneps_pbh((__m512)v));
#else
  for (int i = 0; i < kLanes; ++i) to[i] = to_bfloat16(v[i]);
#endif
}

// --- Dot products of bytes ---
//
// One lane sums the products of 4 unsigned bytes (weights) and 4 signed ones (of a row), exactly.

#if defined(__AVX512VNNI__)
constexpr int kDotLanes = 16;
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
constexpr int kDotLanes = 8;
#else
constexpr int kDotLanes = 4;
#endif
using DotFloats = Vector<float, kDotLanes>;
using DotInts = Vector<int32_t, kDotLanes>;
using DotBytes = Vector<uint8_t, 4 * kDotLanes>;

// 4 bytes of a row, in every lane.
inline DotInts splat_four(const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, sizeof four);
  return four - DotInts{};
}

// sums + w * x, for weights up to 15.
inline DotInts dot(const DotInts& sums, const DotBytes& w, const DotInts& x) {
#if defined(__AVX512VNNI__)
  return (DotInts)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)w, (__m512i)x);
#elif defined(__AVX2__) && defined(__AVXVNNI__)
  return (DotInts)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)w, (__m256i)x);
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
  // Sums of two products are kept in 16 bits, which larger weights would exceed.
  const __m256i pairs = _mm256_maddubs_epi16((__m256i)w, (__m256i)x);
  return sums + (DotInts)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
  // One product of two bytes fits into 16 bits.
  using Shorts = Vector<int16_t, 2 * kDotLanes>;
  using Halves = Vector<uint16_t, 2 * kDotLanes>;
  const Shorts x_even = (Shorts)((Halves)x << 8) >> 8, x_odd = (Shorts)x >> 8;
  const DotInts even = (DotInts)((Shorts)((Halves)w & 255) * x_even);
  const DotInts odd = (DotInts)((Shorts)((Halves)w >> 8) * x_odd);
  using Words = Vector<uint32_t, kDotLanes>;
  const auto low = [](const DotInts& pairs) { return (DotInts)((Words)pairs << 16) >> 16; };
  return sums + low(even) + (even >> 16) + low(odd) + (odd >> 16);
#endif
}

// The same for any weights, of which 128 is subtracted: the sum of (w - 128) * x is
// centred_start(the sum of x), to which centred_dot adds products.
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__) && \
    !defined(__AVX512VNNI__) && !defined(__AVXVNNI__)
inline DotInts centred_start(int32_t) { return DotInts{}; }
inline DotInts centred_dot(const DotInts& sums, const DotBytes& w, const DotInts& x) {
  // Sums of two products of numbers up to 127 fit into 16 bits: the weights are centred first, and
  // take the signs of x.
  const __m256i centred = _mm256_xor_si256((__m256i)w, _mm256_set1_epi8(-128));
  return dot(sums, (DotBytes)_mm256_abs_epi8((__m256i)x),
             (DotInts)_mm256_sign_epi8(centred, (__m256i)x));
}
#else
inline DotInts centred_start(int32_t sum) { return -128 * sum - DotInts{}; }
inline DotInts centred_dot(const DotInts& sums, const DotBytes& w, const DotInts& x) {
  return dot(sums, w, x);
}
#endif

inline DotFloats to_floats(const DotInts& x) { return __builtin_convertvector(x, DotFloats); }

inline DotFloats load_float16(const uint16_t* from) {
#if defined(__AVX512VNNI__)
  return (DotFloats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
  return (DotFloats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
#else
  DotFloats v;
  for (int i = 0; i < kDotLanes; ++i) v[i] = from_float16(from[i]);
  return v;
#endif
}

}  // namespace simd
}  // namespace
