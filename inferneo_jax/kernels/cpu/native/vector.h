// What kernels share: conversions, and one row's work in whatever width this CPU has.
//
// Kernels choose by what the compiler was told the CPU has: __AVX512F__ with __AVX512VNNI__,
// __AVX2__, or neither, where plain loops are left to it.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

inline float from_bfloat16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

#if defined(__AVX512F__)
inline __m512 load_bfloat16(const uint16_t* from) {
  const __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
}
#endif

}  // namespace
