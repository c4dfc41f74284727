// Products of many rows by AMX, the tiles of newer Xeons: 16 rows times 16 outputs at once.
#pragma once

#include <cstdint>

#include "simd.h"

#if defined(__AMX_INT8__) && defined(DOT_AVX512) && defined(__linux__)
#define DOT_AMX
#include <sys/syscall.h>
#include <unistd.h>

namespace {
namespace amx {

constexpr int kRows = 16;

// Whether the system lets this process use the tiles, which it must be asked for.
inline bool allowed() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
}

// The compiler does not know that AMX reads and writes memory.
inline void fence() { asm volatile("" ::: "memory"); }

// Tiles 0 to 3 are sums of `rows` rows, 4 and 5 rows, 6 and 7 weights of `inputs` inputs.
struct Shape {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  Shape(int64_t rows_of_x, int64_t inputs) {
    for (int tile = 0; tile < 8; ++tile) {
      const bool of_x = tile == 4 || tile == 5, of_weights = tile > 5;
      row_bytes[tile] = static_cast<uint16_t>(of_x ? inputs : 64);
      rows[tile] = static_cast<uint8_t>(of_weights ? inputs / 4 : rows_of_x);
    }
  }
};

// The shape of a thread's tiles, until it is left.
class Tiles {
 public:
  explicit Tiles(const Shape& shape) {
    const Shape* kept = &shape;
    asm volatile("" : "+r"(kept) : : "memory");
    _tile_loadconfig(kept);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
};

// The products of rows with two groups of 32 outputs, which lie after one another: `sums` is
// [2][rows][32]. Strides are in bytes.
inline void multiply(const int8_t* x, int64_t x_stride, int64_t group_inputs, const uint8_t* weights,
                     int32_t (*sums)[kRows][32]) {
  constexpr int kWeightStride = 32 * 4, kSumStride = 32 * 4;
  const uint8_t* const next = weights + group_inputs * 32;
  fence();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, x, x_stride);
  _tile_loadd(6, weights, kWeightStride);
  _tile_dpbssd(0, 4, 6);
  _tile_loadd(7, weights + 64, kWeightStride);
  _tile_dpbssd(1, 4, 7);
  _tile_loadd(5, x + group_inputs, x_stride);
  _tile_loadd(6, next, kWeightStride);
  _tile_dpbssd(2, 5, 6);
  _tile_loadd(7, next + 64, kWeightStride);
  _tile_dpbssd(3, 5, 7);
  _tile_stored(0, sums[0], kSumStride);
  _tile_stored(1, &sums[0][0][16], kSumStride);
  _tile_stored(2, sums[1], kSumStride);
  _tile_stored(3, &sums[1][0][16], kSumStride);
  fence();
}

}  // namespace amx
}  // namespace
#endif
