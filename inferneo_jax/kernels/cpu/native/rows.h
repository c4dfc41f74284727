// What is done to one row before it is multiplied: normalised or gated, then quantized.
//
// Plain loops in 16 lanes, which compilers turn into whatever vectors the CPU has: the order of
// every sum is written down, so a row gives the same bits on all of them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t kLanes = 16;

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// 1.5 * 2^23, where floats are integers: added to a value within +-2^22 it rounds it to the nearest
// integer, ties to even, and leaves that in the low bits. No value, NaN neither, makes it undefined.
constexpr float kShift = 12582912.0f;

inline uint32_t low_bits(float shifted) { return to_bits(shifted) - to_bits(kShift); }

// e^x to within 2 units in the last place; e^-87 below, e^88 above.
inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float shifted = x * 1.44269504f + kShift;
  const float n = shifted - kShift;
  const float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;  // ln 2 in two parts
  // Taylor's series; |r| is below 0.35.
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * from_bits((low_bits(shifted) + 127) << 23);
}

// x / sqrt(mean(x^2) + eps) * weights
inline void rms_norm(const float* x, int64_t size, const float* weights, float eps, float* to) {
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) lanes[j] += x[i + j] * x[i + j];
  }
  for (int64_t j = 0; i + j < size; ++j) lanes[j] += x[i + j] * x[i + j];
  float sum = 0;
  for (float lane : lanes) sum += lane;
  const float factor = 1.0f / std::sqrt(sum / static_cast<float>(size) + eps);
  for (i = 0; i < size; ++i) to[i] = x[i] * factor * weights[i];
}

// silu(gate) * up
inline void swiglu(const float* gate, const float* up, int64_t size, float* to) {
  for (int64_t i = 0; i < size; ++i) to[i] = gate[i] / (1.0f + exponential(-gate[i])) * up[i];
}

// The nearest multiples of `absmax / 127`, and that; their sum. `size` is a multiple of 16. A group
// with a value that is no number has no scale that is one.
inline void quantize_group(const float* x, int64_t size, int8_t* values, float* scale,
                           int32_t* sum) {
  // Compared as integers, magnitudes are in the order of their values, and NaN is above them all.
  int32_t lanes[kLanes] = {};
  for (int64_t i = 0; i < size; i += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) {
      const int32_t bits = static_cast<int32_t>(to_bits(x[i + j]) & 0x7fffffff);
      lanes[j] = lanes[j] > bits ? lanes[j] : bits;
    }
  }
  int32_t largest = 0;
  for (int32_t lane : lanes) largest = largest > lane ? largest : lane;
  const float most = from_bits(static_cast<uint32_t>(largest));
  *scale = most / 127.0f;
  const float inverse = most > 0 ? 127.0f / most : 0.0f;
  uint32_t sums[kLanes] = {};
  for (int64_t i = 0; i < size; i += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) {
      const uint32_t value = low_bits(x[i + j] * inverse + kShift);
      values[i + j] = static_cast<int8_t>(value);
      sums[j] += value;
    }
  }
  uint32_t total = 0;
  for (uint32_t lane : sums) total += lane;
  *sum = static_cast<int32_t>(total);
}

}  // namespace
