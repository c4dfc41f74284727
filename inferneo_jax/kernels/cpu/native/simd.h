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
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

// The compiler keeps an array of vectors in registers only if loops over it are unrolled early.
#define UNROLL _Pragma("GCC unroll 8")
#define ROLLED _Pragma("GCC unroll 1")

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
#if defined(__ARM_NEON) && defined(__aarch64__)
  if constexpr (sizeof(V) == 16) return (V)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#endif
  return a * b + c;
}

// a * b + c, rounded once on every CPU. Where there is no instruction for it, the sum in double
// precision is rounded to odd, so that rounding it again, to a float, is exact (Boldo, Melquiond:
// Emulation of FMA and correctly rounded sums, 2008).
template <class V>
inline V fused(const V& a, const V& b, const V& c) {
#if defined(__FMA__) || (defined(__ARM_NEON) && defined(__aarch64__))
  return fma(a, b, c);
#else
  using Doubles = Vector<double, sizeof(V) / sizeof(float)>;
  using Words = Vector<int64_t, sizeof(V) / sizeof(float)>;
  const auto product = __builtin_convertvector(a, Doubles) * __builtin_convertvector(b, Doubles);
  const auto addend = __builtin_convertvector(c, Doubles);
  Doubles sum = product + addend;
  const Doubles added = sum - product;
  const Doubles error = (product - (sum - added)) + (addend - added);
  const Words inexact = (Words)(error > 0) | (Words)(error < 0), odd = -((Words)sum & 1);
  const Words same_sign = ~((Words)(error > 0) ^ (Words)(sum > 0));
  sum = (Doubles)((Words)sum + (inexact & ~odd & (1 - 2 * (1 + same_sign))));
  return __builtin_convertvector(sum, V);
#endif
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

// Not by way of a subnormal float: XLA's threads take these for zeros.
inline float from_float16(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, size = half & 0x7fffu;
  uint32_t bits;
  if (size < 0x0400) {
    const float subnormal = static_cast<float>(size) * 5.9604644775390625e-8f;  // 2^-24
    std::memcpy(&bits, &subnormal, sizeof bits);
  } else {
    bits = (size << 13) + (size < 0x7c00 ? 112u << 23 : 224u << 23);  // infinity and NaN stay so
  }
  bits |= sign;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Rounds to nearest, ties to even.
inline uint16_t to_float16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint16_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return sign | 0x7e00;   // NaN
  if (bits >= 0x477ff000) return sign | 0x7c00;  // rounds to infinity
  if (bits < 0x38800000) {
    // Subnormal: multiples of 2^-24, which the addition rounds to.
    float size;
    std::memcpy(&size, &bits, sizeof size);
    size += 0.5f;
    std::memcpy(&bits, &size, sizeof bits);
    return static_cast<uint16_t>(sign | (bits - 0x3f000000));
  }
  return static_cast<uint16_t>(sign | ((bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13));
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

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define DOT_AVX512
constexpr int kDotLanes = 16;
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define DOT_AVX2
constexpr int kDotLanes = 8;
#else
constexpr int kDotLanes = 4;
#if defined(__ARM_NEON) && defined(__aarch64__)
#define DOT_NEON
#else
#define DOT_PORTABLE
#endif
#endif
// Loops of dot products: without instructions for them, unrolling gains nothing.
#if defined(DOT_PORTABLE)
#define UNROLL_DOT ROLLED
#else
#define UNROLL_DOT UNROLL
#endif
using DotFloats = Vector<float, kDotLanes>;
using DotInts = Vector<int32_t, kDotLanes>;
using DotBytes = Vector<uint8_t, 4 * kDotLanes>;
using DotHalves = Vector<uint16_t, 2 * kDotLanes>;

// 4 bytes of a row, in every lane.
inline DotInts splat_four(const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, sizeof four);
  return four - DotInts{};
}

// The bits of each byte, moved to the right, or to the left if `count` is negative. Bits of its
// neighbour move in.
inline DotBytes move_right(const DotBytes& bytes, int count) {
  return (DotBytes)(count < 0 ? (DotHalves)bytes << -count : (DotHalves)bytes >> count);
}

// The numbers of a table whose indices are `at`.
inline DotBytes look_up(const uint8_t (&table)[16], const DotBytes& at) {
#if defined(DOT_AVX512)
  const __m128i numbers = _mm_loadu_si128((const __m128i*)table);
  return (DotBytes)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(numbers), (__m512i)at);
#elif defined(DOT_AVX2)
  const __m128i numbers = _mm_loadu_si128((const __m128i*)table);
  return (DotBytes)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(numbers), (__m256i)at);
#elif defined(DOT_NEON)
  return (DotBytes)vqtbl1q_u8(vld1q_u8(table), (uint8x16_t)at);
#else
  DotBytes found;
  for (int i = 0; i < 4 * kDotLanes; ++i) found[i] = table[at[i]];
  return found;
#endif
}

// Dot products with weights from 0 to kMost, of which kOffset is subtracted. `correction` is the
// offset times the sum of the row's bytes.
//
// prepare() makes an operand of the weights. Sums begin with start(), take up to kChain operands with
// add(), and are completed by finish().
#if defined(DOT_AVX2) && !defined(__AVXVNNI__)
// Sums of products are kept in 16 bits, as long as they fit.
template <int kMost, int kOffset>
struct Dot {
  using Sums = __m256i;
  static constexpr int kChain = 32767 / (2 * 127 * kMost);
  static DotBytes prepare(const DotBytes& w) { return w; }
  static Sums start(int32_t) { return _mm256_setzero_si256(); }
  static void add(Sums& sums, const DotBytes& w, const DotInts& x) {
    sums = _mm256_add_epi16(sums, _mm256_maddubs_epi16((__m256i)w, (__m256i)x));
  }
  static DotInts finish(const Sums& sums, int32_t correction) {
    const auto wide = (DotInts)_mm256_madd_epi16(sums, _mm256_set1_epi16(1));
    return kOffset ? wide - correction : wide;
  }
};
// Two products of up to 128 and up to 127 fit: the weights are centred, and the row takes their signs.
template <>
struct Dot<255, 128> {
  using Sums = DotInts;
  static constexpr int kChain = 8;
  static DotBytes prepare(const DotBytes& w) { return w ^ 128; }
  static Sums start(int32_t) { return DotInts{}; }
  static void add(Sums& sums, const DotBytes& w, const DotInts& x) {
    const __m256i sizes = _mm256_abs_epi8((__m256i)w);
    const __m256i pairs = _mm256_maddubs_epi16(sizes, _mm256_sign_epi8((__m256i)x, (__m256i)w));
    sums += (DotInts)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  }
  static DotInts finish(const Sums& sums, int32_t) { return sums; }
};
#elif defined(DOT_NEON)
// Both operands are signed here.
template <int kMost, int kOffset>
struct Dot {
  using Sums = DotInts;
  static constexpr int kChain = 8;
  static constexpr bool kCentred = kMost > 127;
  static DotBytes prepare(const DotBytes& w) { return kCentred ? w ^ 128 : w; }
  static Sums start(int32_t correction) { return (kCentred ? 0 : -correction) - DotInts{}; }
  static void add(Sums& sums, const DotBytes& w, const DotInts& x) {
#if defined(__ARM_FEATURE_DOTPROD)
    sums = (DotInts)vdotq_s32((int32x4_t)sums, (int8x16_t)w, (int8x16_t)x);
#else
    const int16x8_t low = vmull_s8(vget_low_s8((int8x16_t)w), vget_low_s8((int8x16_t)x));
    const int16x8_t high = vmull_high_s8((int8x16_t)w, (int8x16_t)x);
    // Two products of numbers up to 127 fit into 16 bits.
    sums = (DotInts)vpadalq_s16((int32x4_t)sums, vpaddq_s16(low, high));
#endif
  }
  static DotInts finish(const Sums& sums, int32_t) { return sums; }
};
#else
template <int kMost, int kOffset>
struct Dot {
  using Sums = DotInts;
  static constexpr int kChain = 8;
  static DotBytes prepare(const DotBytes& w) { return w; }
  static Sums start(int32_t correction) { return -correction - DotInts{}; }
  static void add(Sums& sums, const DotBytes& w, const DotInts& x) {
#if defined(DOT_AVX512)
    sums = (DotInts)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)w, (__m512i)x);
#elif defined(DOT_AVX2)
    sums = (DotInts)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)w, (__m256i)x);
#else
    // One product of two bytes fits into 16 bits.
    using Shorts = Vector<int16_t, 2 * kDotLanes>;
    const Shorts x_even = (Shorts)((DotHalves)x << 8) >> 8, x_odd = (Shorts)x >> 8;
    const DotInts even = (DotInts)((Shorts)((DotHalves)w & 255) * x_even);
    const DotInts odd = (DotInts)((Shorts)((DotHalves)w >> 8) * x_odd);
    using Words = Vector<uint32_t, kDotLanes>;
    const auto low = [](const DotInts& pairs) { return (DotInts)((Words)pairs << 16) >> 16; };
    sums += low(even) + (even >> 16) + low(odd) + (odd >> 16);
#endif
  }
  static DotInts finish(const Sums& sums, int32_t) { return sums; }
};
#endif

inline DotFloats to_floats(const DotInts& x) { return __builtin_convertvector(x, DotFloats); }

inline DotFloats load_float16(const uint16_t* from) {
#if defined(DOT_AVX512)
  return (DotFloats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
#elif defined(DOT_AVX2)
  return (DotFloats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
#elif defined(DOT_NEON)
  return (DotFloats)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from)));
#else
  DotFloats v;
  for (int i = 0; i < kDotLanes; ++i) v[i] = from_float16(from[i]);
  return v;
#endif
}

// kDotLanes bytes, each widened.
inline DotInts load_bytes(const uint8_t* from) {
#if defined(DOT_AVX512)
  return (DotInts)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from));
#elif defined(DOT_AVX2)
  return (DotInts)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from));
#else
  return __builtin_convertvector(load<Vector<uint8_t, kDotLanes>>(from), DotInts);
#endif
}
inline DotInts load_bytes(const int8_t* from) {
#if defined(DOT_AVX512)
  return (DotInts)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from));
#elif defined(DOT_AVX2)
  return (DotInts)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from));
#else
  return __builtin_convertvector(load<Vector<int8_t, kDotLanes>>(from), DotInts);
#endif
}

}  // namespace simd
}  // namespace
