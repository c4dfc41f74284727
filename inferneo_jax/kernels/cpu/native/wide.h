// Vectors of floats as wide as the CPU's registers, in the compiler's own terms: one source for all
// widths. Products and sums are fused only where fma() says so.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

// The compiler keeps an array of vectors in registers only where loops over it are unrolled early.
#define UNROLL _Pragma("GCC unroll 8")

namespace {
namespace wide {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
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

// a * b + c
inline Vector fma(Vector a, Vector b, Vector c) {
#if defined(__AVX512F__)
  return (Vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
  return (Vector)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

inline Vector widen(Bytes v) {
#if defined(__AVX512F__)
  return (Vector)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)v));
#elif defined(__AVX2__)
  return (Vector)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128((int64_t)v)));
#else
  return __builtin_convertvector(v, Vector);
#endif
}

// Asks for a line that is read soon. Not into the first level: its few misses in flight would be
// the limit (10 against 17 GB/s on one core of Zen 4).
inline void prefetch(const void* at) { __builtin_prefetch(at, 0, 2); }

// 0, 1, 2, ...
inline Integers lane_numbers() {
  Integers lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane;
}

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

// 2^x for x <= 126, to 2e-7 of it; below 2^-125 it is that. The fraction's power is a minimax
// polynomial; adding 1.5 * 2^23 rounds to a whole number and leaves it in the low bits, which then
// join the exponent.
inline Vector exp2_of(Vector x) {
  const Vector magic = splat(12582912.0f);
  x = max(x, splat(-125.0f));
  const Vector shifted = x + magic;
  const Vector f = x - (shifted - magic);
  Vector y = splat(1.3276472e-3f);
  y = fma(y, f, splat(9.67554133e-3f));
  y = fma(y, f, splat(5.55071327e-2f));
  y = fma(y, f, splat(0.240221197f));
  y = fma(y, f, splat(0.693146967f));
  y = fma(y, f, splat(1.0f));
  return (Vector)((Integers)y + ((Integers)shifted << 23));
}

inline float exp2_of(float x) { return exp2_of(splat(x))[0]; }

}  // namespace wide
}  // namespace
