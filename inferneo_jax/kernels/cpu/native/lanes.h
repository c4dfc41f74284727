// The few vector operations that products are made of, in the width that this CPU has.
//
// Chosen by what the compiler was told it has: AVX-512 with VNNI, AVX2 with or without VNNI, or
// neither, where plain loops are left to the compiler.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

inline float from_float16(uint16_t half) {
  // Its exponent and fraction as those of a float, which are then 2^112 times too small.
  const uint32_t bits = (half & 0x7fffu) << 13 | (half & 0x8000u) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value * 5.192296858534828e33f;
}

#if defined(__AVX512VNNI__)

constexpr int kWidth = 16;
using Bytes = __m512i;
using Ints = __m512i;
using Floats = __m512;

inline Bytes load_bytes(const uint8_t* from) { return _mm512_loadu_si512(from); }
inline Bytes low_nibbles(Bytes x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
inline Bytes high_nibbles(Bytes x) { return low_nibbles(_mm512_srli_epi16(x, 4)); }
inline Bytes splat_four(const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  return _mm512_set1_epi32(four);
}
inline Ints zeros() { return _mm512_setzero_si512(); }
inline Ints dot(Ints sums, Bytes w, Bytes x) { return _mm512_dpbusd_epi32(sums, w, x); }
inline Ints centred_start(int32_t sum) { return _mm512_set1_epi32(-128 * sum); }
inline Ints centred_dot(Ints sums, Bytes w, Bytes x) { return dot(sums, w, x); }

inline Floats splat(float x) { return _mm512_set1_ps(x); }
inline Floats to_floats(Ints x) { return _mm512_cvtepi32_ps(x); }
inline Floats load_floats(const float* from) { return _mm512_loadu_ps(from); }
inline Floats load_halves(const uint16_t* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline void store(float* to, Floats x) { _mm512_storeu_ps(to, x); }

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

constexpr int kWidth = 8;
using Bytes = __m256i;
using Ints = __m256i;
using Floats = __m256;

inline Bytes load_bytes(const uint8_t* from) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}
inline Bytes low_nibbles(Bytes x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
inline Bytes high_nibbles(Bytes x) { return low_nibbles(_mm256_srli_epi16(x, 4)); }
inline Bytes splat_four(const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  return _mm256_set1_epi32(four);
}
inline Ints zeros() { return _mm256_setzero_si256(); }
#if defined(__AVXVNNI__)
inline Ints dot(Ints sums, Bytes w, Bytes x) { return _mm256_dpbusd_avx_epi32(sums, w, x); }
inline Ints centred_start(int32_t sum) { return _mm256_set1_epi32(-128 * sum); }
inline Ints centred_dot(Ints sums, Bytes w, Bytes x) { return dot(sums, w, x); }
#else
// Sums of two products are kept in 16 bits, which those of nibbles do not leave.
inline Ints dot(Ints sums, Bytes w, Bytes x) {
  const __m256i pairs = _mm256_maddubs_epi16(w, x);
  return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
// Nor do those of magnitudes up to 127: so the weights are centred first, and given x's signs.
inline Ints centred_start(int32_t) { return zeros(); }
inline Ints centred_dot(Ints sums, Bytes w, Bytes x) {
  const __m256i centred = _mm256_xor_si256(w, _mm256_set1_epi8(-128));
  return dot(sums, _mm256_abs_epi8(x), _mm256_sign_epi8(centred, x));
}
#endif

inline Floats splat(float x) { return _mm256_set1_ps(x); }
inline Floats to_floats(Ints x) { return _mm256_cvtepi32_ps(x); }
inline Floats load_floats(const float* from) { return _mm256_loadu_ps(from); }
inline Floats load_halves(const uint16_t* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
inline Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline void store(float* to, Floats x) { _mm256_storeu_ps(to, x); }

#else

constexpr int kWidth = 16;
template <typename T, int kSize = kWidth>
struct Lanes {
  T at[kSize];
};
using Bytes = Lanes<uint8_t, 4 * kWidth>;
using Ints = Lanes<int32_t>;
using Floats = Lanes<float>;

template <typename Result, typename Of>
inline Result each(Of of) {
  Result result;
  for (size_t i = 0; i < sizeof result.at / sizeof *result.at; ++i) result.at[i] = of(i);
  return result;
}

inline Bytes load_bytes(const uint8_t* from) {
  return each<Bytes>([=](size_t i) { return from[i]; });
}
inline Bytes low_nibbles(const Bytes& x) {
  return each<Bytes>([&](size_t i) { return static_cast<uint8_t>(x.at[i] & 15); });
}
inline Bytes high_nibbles(const Bytes& x) {
  return each<Bytes>([&](size_t i) { return static_cast<uint8_t>(x.at[i] >> 4); });
}
inline const int8_t* splat_four(const int8_t* x) { return x; }
inline Ints zeros() { return Ints{}; }
inline Ints dot(const Ints& sums, const Bytes& w, const int8_t* x) {
  return each<Ints>([&](size_t i) {
    const uint8_t* four = w.at + 4 * i;
    return sums.at[i] + four[0] * x[0] + four[1] * x[1] + four[2] * x[2] + four[3] * x[3];
  });
}
inline Ints centred_start(int32_t sum) {
  return each<Ints>([=](size_t) { return -128 * sum; });
}
inline Ints centred_dot(const Ints& sums, const Bytes& w, const int8_t* x) {
  return dot(sums, w, x);
}

inline Floats splat(float x) {
  return each<Floats>([=](size_t) { return x; });
}
inline Floats to_floats(const Ints& x) {
  return each<Floats>([&](size_t i) { return static_cast<float>(x.at[i]); });
}
inline Floats load_floats(const float* from) {
  return each<Floats>([=](size_t i) { return from[i]; });
}
inline Floats load_halves(const uint16_t* from) {
  return each<Floats>([=](size_t i) { return from_float16(from[i]); });
}
inline Floats add(const Floats& a, const Floats& b) {
  return each<Floats>([&](size_t i) { return a.at[i] + b.at[i]; });
}
inline Floats multiply(const Floats& a, const Floats& b) {
  return each<Floats>([&](size_t i) { return a.at[i] * b.at[i]; });
}
inline Floats multiply_add(const Floats& a, const Floats& b, const Floats& c) {
  return add(multiply(a, b), c);
}
inline void store(float* to, const Floats& x) { std::memcpy(to, x.at, sizeof x.at); }

#endif

}  // namespace
