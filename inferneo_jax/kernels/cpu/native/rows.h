// What is done to one row before it is multiplied: normalised or gated, then quantized.
//
// Written in vectors of 16, which compilers take apart into those that the CPU has: the order of
// every sum is written down, so a row gives the same bits on all of them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "wide.h"

namespace {

constexpr int64_t kStride = 16;
typedef float Floats16 __attribute__((vector_size(kStride * 4)));
typedef int32_t Ints16 __attribute__((vector_size(kStride * 4)));
typedef uint32_t Bits16 __attribute__((vector_size(kStride * 4)));
typedef int8_t Bytes16 __attribute__((vector_size(kStride)));

// Vectors that may be wider than registers are handed over by reference: how else differs between
// compilers and their options.
inline void load16(const float* from, Floats16& to) { std::memcpy(&to, from, sizeof to); }

// The first `count` of them, and zeros.
inline void load_some(const float* from, int64_t count, Floats16& to) {
  to = Floats16{};
  std::memcpy(&to, from, std::clamp<int64_t>(count, 0, kStride) * sizeof *from);
}

inline int32_t largest_of(const Ints16& x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_epi32((__m512i)x);
#else
  int32_t largest = x[0];
  for (int64_t lane = 1; lane < kStride; ++lane) largest = std::max(largest, x[lane]);
  return largest;
#endif
}

inline int32_t sum_of(const Bits16& x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_epi32((__m512i)x);
#else
  uint32_t sum = 0;
  for (int64_t lane = 0; lane < kStride; ++lane) sum += x[lane];
  return static_cast<int32_t>(sum);
#endif
}

// The low bytes.
inline void store_bytes(const Bits16& x, int8_t* to) {
#if defined(__AVX512F__)
  const __m128i bytes = _mm512_cvtepi32_epi8((__m512i)x);
#else
  const auto bytes = __builtin_convertvector((Ints16)x, Bytes16);
#endif
  std::memcpy(to, &bytes, sizeof bytes);
}

// 1.5 * 2^23, where floats are integers: added to a value within +-2^22 it rounds it to the nearest
// integer, ties to even, and leaves that in the low bits. No value, NaN neither, makes it undefined.
constexpr float kShift = 12582912.0f;
constexpr uint32_t kShiftBits = 0x4b400000;

// e^x to within 2 units in the last place; e^-87 below, e^88 above.
inline void exponential(Floats16& x) {
  const Floats16 least = Floats16{} - 87.0f, most = Floats16{} + 88.0f;
  x = x < least ? least : x;
  x = x > most ? most : x;
  const Floats16 shifted = x * 1.44269504f + kShift;
  const Floats16 n = shifted - kShift;
  const Floats16 r = (x - n * 0.693145752f) - n * 1.42860677e-6f;  // ln 2 in two parts
  // Taylor's series; |r| is below 0.35.
  Floats16 p = Floats16{} + 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  x = p * (Floats16)(((Bits16)shifted - kShiftBits + 127) << 23);
}

// 1 / sqrt(mean(x^2) + eps)
inline float rms_factor(const float* x, int64_t size, float eps) {
  Floats16 sums = {}, some;
  int64_t i = 0;
  for (; i + kStride <= size; i += kStride) {
    load16(x + i, some);
    sums += some * some;
  }
  if (i < size) {
    load_some(x + i, size - i, some);
    sums += some * some;
  }
  float sum = 0;
  for (int64_t lane = 0; lane < kStride; ++lane) sum += sums[lane];
  return 1.0f / std::sqrt(sum / static_cast<float>(size) + eps);
}

// silu(gate) * up
inline void swiglu(const Floats16& gate, const Floats16& up, Floats16& to) {
  Floats16 power = -gate;
  exponential(power);
  to = gate / (1.0f + power) * up;
}

// The nearest multiples of `absmax / 127` of a span of values, and that; their sum in each group.
// A span with a value that is no number has no scale that is one.
template <int64_t kSpan, int64_t kGroup>
inline void quantize_span(const Floats16 (&x)[kSpan / kStride], int8_t* values, float* scale,
                          int32_t* sums) {
  // Compared as integers, magnitudes are in the order of their values, and NaN is above them all.
  Ints16 largest = {};
  UNROLL for (int64_t i = 0; i < kSpan / kStride; ++i) {
    const Ints16 magnitudes = (Ints16)x[i] & 0x7fffffff;
    largest = largest > magnitudes ? largest : magnitudes;
  }
  const int32_t bits = largest_of(largest);
  float most;
  std::memcpy(&most, &bits, sizeof most);
  *scale = most / 127.0f;
  const float inverse = most > 0 ? 127.0f / most : 0.0f;
  UNROLL for (int64_t group = 0; group < kSpan / kGroup; ++group) {
    Bits16 lanes = {};
    UNROLL for (int64_t i = 0; i < kGroup / kStride; ++i) {
      const int64_t at = group * kGroup / kStride + i;
      const Bits16 rounded = (Bits16)(x[at] * inverse + kShift) - kShiftBits;
      store_bytes(rounded, values + at * kStride);
      lanes += rounded;
    }
    sums[group] = sum_of(lanes);
  }
}

}  // namespace
