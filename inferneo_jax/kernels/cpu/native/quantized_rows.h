// What happens to a row before it is multiplied: it is normalised or gated, then quantized.
//
// All of it is written in vectors of 16, which compilers split into those that the CPU has. So the
// order of every sum is fixed, and a row gives the same bits on all CPUs.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "block_formats.h"
#include "blocks.h"

namespace {
namespace quantized {

// 1.5 * 2^23. Adding it to a value within +-2^22 rounds that to the nearest integer, ties to even,
// and leaves the integer in the low bits. This is defined for all values, NaN included.
constexpr float kShift = 12582912.0f;
constexpr uint32_t kShiftBits = 0x4b400000;

// e^x to within 2 units in the last place; x is clamped to [-87, 88].
inline void exponential(Floats16& x) {
  const Floats16 least = Floats16{} - 87.0f, most = Floats16{} + 88.0f;
  x = x < least ? least : x;
  x = x > most ? most : x;
  const Floats16 shifted = x * 1.44269504f + kShift;
  const Floats16 n = shifted - kShift;
  const Floats16 r = (x - n * 0.693145752f) - n * 1.42860677e-6f;  // ln 2 in two parts
  // The Taylor series, for |r| < 0.35.
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
  for (; i + 16 <= size; i += 16) {
    load16(x + i, some);
    sums += some * some;
  }
  if (i < size) {
    load_some(x + i, size - i, some);
    sums += some * some;
  }
  return 1.0f / std::sqrt(reduce_add(sums) / static_cast<float>(size) + eps);
}

// silu(gate) * up
inline void swiglu(const Floats16& gate, const Floats16& up, Floats16& to) {
  Floats16 power = -gate;
  exponential(power);
  to = gate / (1.0f + power) * up;
}

// Rounds each half of a span to multiples of its scale, `absmax / 127`. The scale of a half with a NaN
// is NaN.
inline void quantize_span(const Floats16 (&x)[kSpan / 16], int8_t* values,
                          inferneo::RowSpan& about) {
  UNROLL for (int64_t half = 0; half < 2; ++half) {
    // As integers, magnitudes have the order of their values, and NaN is above them all.
    const Ints16 first = (Ints16)x[2 * half] & 0x7fffffff, second = (Ints16)x[2 * half + 1] & 0x7fffffff;
    const int32_t bits = reduce_max(first > second ? first : second);
    float most;
    std::memcpy(&most, &bits, sizeof most);
    const float scale = most / 127.0f, inverse = most > 0 ? 127.0f / most : 0.0f;
    int32_t sum = 0;
    UNROLL for (int64_t i = 2 * half; i < 2 * half + 2; ++i) {
      const Bits16 rounded = (Bits16)(x[i] * inverse + kShift) - kShiftBits;
      store_bytes(rounded, values + i * 16);
      about.sums_of_16[i] = reduce_add(rounded);
      sum += about.sums_of_16[i];
    }
    about.scales[half] = scale;
    about.scaled_sums[half] = static_cast<float>(sum) * scale;
  }
}

}  // namespace quantized
}  // namespace
