// The block formats of ggml, as they are multiplied.
//
// A matrix is stored in blocks of 32 outputs, each a row of superblocks of 64 or 256 inputs, so that
// a block is one stream of memory. In a superblock the bytes of ggml's blocks lie as words of 4 bytes,
// with those of 32 outputs side by side, as one instruction multiplies the values of 4 inputs. Only
// packed scales, and the fifth bits of Q5_0 and Q5_1, are unpacked or reordered.
//
//   weight = scale * (value - kOffset) + minimum
//
// Of each format
//   kInputs          inputs of a superblock
//   kFileInputs      inputs of a block of ggml, of kFileBytes
//   kGroup           inputs that share a scale and a minimum, if there is one (kMinimum)
//   kMost, kOffset   the largest value, and what is subtracted from it
//   quad()           the values of 4 inputs and kDotLanes outputs
//   scale()          the scales of a group
//   minimum()        its minima
//   encode()         takes an output's block of ggml, the superblock's number `index`
//
// `span` is a span of 64 inputs in the superblock; a quad or group is one of that span's.
#pragma once

#include <cstdint>
#include <cstring>

#include "simd.h"

namespace {
namespace quantized {

using namespace simd;

constexpr int64_t kBlock = 32;  // outputs
constexpr int64_t kSpan = 64;   // inputs that are unpacked at a time; the 32 of a half share a scale of a row

using Word = uint8_t[kBlock][4];
using Float16s = uint16_t[kBlock];
using Bytes = uint8_t[kBlock];
using SignedBytes = int8_t[kBlock];

inline DotBytes load_word(const Word& word, int64_t output) {
  return load<DotBytes>(word[output]);
}

// Two bits of each byte, `shift` from the right, moved to `to`.
inline DotBytes two_bits(const DotBytes& bytes, int shift, int to) {
  return move_right(bytes, shift - to) & static_cast<uint8_t>(3 << to);
}

inline DotBytes nibbles(const DotBytes& bytes, bool high) {
  return high ? bytes >> 4 : bytes & 15;
}

// Puts words of a block of ggml beside those of the other outputs.
template <int64_t kWords>
inline void put_words(const uint8_t* from, int64_t output, Word (&words)[kWords]) {
  for (auto& word : words) {
    std::memcpy(word[output], from, 4);
    from += 4;
  }
}

inline uint16_t read16(const uint8_t* from) {
  uint16_t value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

// Scales and minima of 6 bits, as Q4_K and Q5_K pack 8 of each into 12 bytes.
inline void put_scales(const uint8_t* packed, int64_t output, Bytes (&scales)[8],
                       Bytes (&minima)[8]) {
  for (int i = 0; i < 4; ++i) {
    const uint8_t first = packed[i], second = packed[4 + i], third = packed[8 + i];
    scales[i][output] = first & 63;
    minima[i][output] = second & 63;
    scales[4 + i][output] = (third & 15) | (first >> 6 << 4);
    minima[4 + i][output] = (third >> 4) | (second >> 6 << 4);
  }
}

// The sign of a float16 is changed: minima are added.
inline uint16_t negated(uint16_t half) { return half ^ 0x8000; }

struct Packed {
  static constexpr bool kUnpacked = false;
};

struct Q8_0 : Packed {
  static constexpr int64_t kInputs = 64, kFileInputs = 32, kFileBytes = 34, kGroup = 32;
  static constexpr int kMost = 255, kOffset = 128;
  static constexpr bool kMinimum = false;
  Float16s scales[2];
  Word values[16];

  DotBytes quad(int64_t, int64_t i, int64_t output) const { return load_word(values[i], output); }
  DotFloats scale(int64_t, int64_t group, int64_t output) const {
    return load_float16(scales[group] + output);
  }
  void encode(const uint8_t* from, int64_t index, int64_t output) {
    scales[index][output] = read16(from);
    for (int64_t i = 0; i < 8; ++i) {
      uint32_t word;
      std::memcpy(&word, from + 2 + 4 * i, sizeof word);
      word ^= 0x80808080;
      std::memcpy(values[index * 8 + i][output], &word, sizeof word);
    }
  }
};

// 4 bits, in groups of 32 inputs: the low ones of a word are those of the first 16 inputs.
struct FourBits : Packed {
  static constexpr int64_t kInputs = 64, kFileInputs = 32, kGroup = 32;
  Word values[8];

  DotBytes quad(int64_t, int64_t i, int64_t output) const {
    return nibbles(load_word(values[i / 8 * 4 + i % 4], output), i % 8 >= 4);
  }
  void put_values(const uint8_t* from, int64_t index, int64_t output) {
    for (int64_t i = 0; i < 4; ++i) std::memcpy(values[index * 4 + i][output], from + 4 * i, 4);
  }
};

struct Q4_0 : FourBits {
  static constexpr int64_t kFileBytes = 18;
  static constexpr int kMost = 15, kOffset = 8;
  static constexpr bool kMinimum = false;
  Float16s scales[2];

  DotFloats scale(int64_t, int64_t group, int64_t output) const {
    return load_float16(scales[group] + output);
  }
  void encode(const uint8_t* from, int64_t index, int64_t output) {
    scales[index][output] = read16(from);
    put_values(from + 2, index, output);
  }
};

struct Q4_1 : FourBits {
  static constexpr int64_t kFileBytes = 20;
  static constexpr int kMost = 15, kOffset = 0;
  static constexpr bool kMinimum = true;
  Float16s scales[2], minima[2];

  DotFloats scale(int64_t, int64_t group, int64_t output) const {
    return load_float16(scales[group] + output);
  }
  DotFloats minimum(int64_t, int64_t group, int64_t output) const {
    return load_float16(minima[group] + output);
  }
  void encode(const uint8_t* from, int64_t index, int64_t output) {
    scales[index][output] = read16(from);
    minima[index][output] = read16(from + 2);
    put_values(from + 4, index, output);
  }
};

// The values of IQ4_NL and IQ4_XS, with 128 added.
constexpr uint8_t kUneven[16] = {1,   24,  45,  63,  79,  93,  106, 118,
                                 129, 141, 153, 166, 181, 197, 217, 241};

struct IQ4_NL : Q4_0 {
  static constexpr int kMost = 255, kOffset = 128;

  DotBytes quad(int64_t span, int64_t i, int64_t output) const {
    return look_up(kUneven, Q4_0::quad(span, i, output));
  }
};

// A fifth bit: bit i of a byte belongs to the group's quad i.
struct FiveBits : FourBits {
  Word fifths[2];

  DotBytes quad(int64_t span, int64_t i, int64_t output) const {
    const DotBytes fifth = move_right(load_word(fifths[i / 8], output), i % 8 - 4) & 16;
    return FourBits::quad(span, i, output) | fifth;
  }
  void put_fifths(const uint8_t* from, int64_t index, int64_t output) {
    uint32_t bits;
    std::memcpy(&bits, from, sizeof bits);
    for (int k = 0; k < 4; ++k) {
      uint32_t every_fourth = bits >> k & 0x11111111;
      every_fourth = (every_fourth | every_fourth >> 3) & 0x03030303;
      every_fourth = (every_fourth | every_fourth >> 6) & 0x000f000f;
      fifths[index][output][k] = static_cast<uint8_t>(every_fourth | every_fourth >> 12);
    }
  }
};

struct Q5_0 : FiveBits {
  static constexpr int64_t kFileBytes = 22;
  static constexpr int kMost = 31, kOffset = 16;
  static constexpr bool kMinimum = false;
  Float16s scales[2];

  DotFloats scale(int64_t, int64_t group, int64_t output) const {
    return load_float16(scales[group] + output);
  }
  void encode(const uint8_t* from, int64_t index, int64_t output) {
    scales[index][output] = read16(from);
    put_fifths(from + 2, index, output);
    put_values(from + 6, index, output);
  }
};

struct Q5_1 : FiveBits {
  static constexpr int64_t kFileBytes = 24;
  static constexpr int kMost = 31, kOffset = 0;
  static constexpr bool kMinimum = true;
  Float16s scales[2], minima[2];

  DotFloats scale(int64_t, int64_t group, int64_t output) const {
    return load_float16(scales[group] + output);
  }
  DotFloats minimum(int64_t, int64_t group, int64_t output) const {
    return load_float16(minima[group] + output);
  }
  void encode(const uint8_t* from, int64_t index, int64_t output) {
    scales[index][output] = read16(from);
    minima[index][output] = read16(from + 2);
    put_fifths(from + 4, index, output);
    put_values(from + 8, index, output);
  }
};

// --- Superblocks of 256 inputs ---

// A float16 scale of the superblock, that of each group a multiple of it.
template <class Multiples, int64_t kGroups>
struct Scaled : Packed {
  static constexpr int64_t kInputs = 256, kFileInputs = 256, kGroup = kInputs / kGroups;
  Float16s unit;
  Multiples multiples[kGroups];

  DotFloats scale(int64_t span, int64_t group, int64_t output) const {
    const auto& some = multiples[span * kGroups / 4 + group];
    return load_float16(unit + output) * to_floats(load_bytes(some + output));
  }
};

// The same with minima.
struct ScaledWithMinima : Scaled<Bytes, 8> {
  static constexpr bool kMinimum = true;
  Float16s unit_of_minima;  // with the sign changed
  Bytes multiples_of_minima[8];

  DotFloats minimum(int64_t span, int64_t group, int64_t output) const {
    const auto& some = multiples_of_minima[span * 2 + group];
    return load_float16(unit_of_minima + output) * to_floats(load_bytes(some + output));
  }
  void put_header(const uint8_t* from, int64_t output) {
    unit[output] = read16(from);
    unit_of_minima[output] = negated(read16(from + 2));
    put_scales(from + 4, output, multiples, multiples_of_minima);
  }
};

struct Q4_K : ScaledWithMinima {
  static constexpr int64_t kFileBytes = 144;
  static constexpr int kMost = 15, kOffset = 0;
  Word values[32];  // the low bits of 8 words are one group, the high ones the next

  DotBytes quad(int64_t span, int64_t i, int64_t output) const {
    return nibbles(load_word(values[span * 8 + i % 8], output), i >= 8);
  }
  void encode(const uint8_t* from, int64_t, int64_t output) {
    put_header(from, output);
    put_words(from + 16, output, values);
  }
};

struct Q5_K : ScaledWithMinima {
  static constexpr int64_t kFileBytes = 176;
  static constexpr int kMost = 31, kOffset = 0;
  Word values[32];
  Word fifths[8];  // of these 8 words, each bit is another group's

  DotBytes quad(int64_t span, int64_t i, int64_t output) const {
    const auto some = (DotHalves)load_word(fifths[i % 8], output) >> (span * 2 + i / 8);
    const DotBytes fifth = (DotBytes)(some << 4) & 16;
    return nibbles(load_word(values[span * 8 + i % 8], output), i >= 8) | fifth;
  }
  void encode(const uint8_t* from, int64_t, int64_t output) {
    put_header(from, output);
    put_words(from + 16, output, fifths);
    put_words(from + 48, output, values);
  }
};

struct Q6_K : Scaled<SignedBytes, 16> {
  static constexpr int64_t kFileBytes = 210;
  static constexpr int kMost = 63, kOffset = 32;
  static constexpr bool kMinimum = false;
  Word low[32];   // 4 bits: of 16 words, those of a span, then of the next
  Word high[16];  // 2 bits: of 8 words, those of a half of a span, then of the next three

  DotBytes quad(int64_t span, int64_t i, int64_t output) const {
    const DotBytes two = load_word(high[span / 2 * 8 + i % 8], output);
    return nibbles(load_word(low[span / 2 * 16 + i], output), span % 2) |
           two_bits(two, static_cast<int>(span % 2 * 4 + i / 8 * 2), 4);
  }
  void encode(const uint8_t* from, int64_t, int64_t output) {
    put_words(from, output, low);
    put_words(from + 128, output, high);
    for (int64_t i = 0; i < 16; ++i) {
      multiples[i][output] = static_cast<int8_t>(from[192 + i]);
    }
    unit[output] = read16(from + 208);
  }
};

struct Q3_K : Scaled<SignedBytes, 16> {
  static constexpr int64_t kFileBytes = 110;
  static constexpr int kMost = 7, kOffset = 4;
  static constexpr bool kMinimum = false;
  Word low[16];   // 2 bits, as the high ones of Q6_K
  Word thirds[8];  // of these 8 words, each bit is another half of a span

  DotBytes quad(int64_t span, int64_t i, int64_t output) const {
    const auto some = (DotHalves)load_word(thirds[i % 8], output) >> (span * 2 + i / 8);
    return two_bits(load_word(low[span / 2 * 8 + i % 8], output),
                    static_cast<int>(span % 2 * 4 + i / 8 * 2), 0) |
           ((DotBytes)(some << 2) & 4);
  }
  void encode(const uint8_t* from, int64_t, int64_t output) {
    put_words(from, output, thirds);
    put_words(from + 32, output, low);
    const uint8_t* const packed = from + 96;
    for (int i = 0; i < 16; ++i) {
      const int low_bits = packed[i % 8] >> i / 8 * 4 & 15;
      const int high_bits = packed[8 + i % 4] >> i / 4 * 2 & 3;
      multiples[i][output] = static_cast<int8_t>((low_bits | high_bits << 4) - 32);
    }
    unit[output] = read16(from + 108);
  }
};

struct Q2_K : Packed {
  static constexpr int64_t kInputs = 256, kFileInputs = 256, kFileBytes = 84, kGroup = 16;
  static constexpr int kMost = 3, kOffset = 0;
  static constexpr bool kMinimum = true;
  Float16s unit, unit_of_minima;  // the second with the sign changed
  Bytes multiples[16];            // of the first in the low bits, of the second in the high ones
  Word values[16];                // as the high bits of Q6_K

  DotBytes quad(int64_t span, int64_t i, int64_t output) const {
    return two_bits(load_word(values[span / 2 * 8 + i % 8], output),
                    static_cast<int>(span % 2 * 4 + i / 8 * 2), 0);
  }
  DotFloats scale(int64_t span, int64_t group, int64_t output) const {
    const DotInts both = load_bytes(multiples[span * 4 + group] + output);
    return load_float16(unit + output) * to_floats(both & 15);
  }
  DotFloats minimum(int64_t span, int64_t group, int64_t output) const {
    const DotInts both = load_bytes(multiples[span * 4 + group] + output);
    return load_float16(unit_of_minima + output) * to_floats(both >> 4);
  }
  void encode(const uint8_t* from, int64_t, int64_t output) {
    for (int64_t i = 0; i < 16; ++i) multiples[i][output] = from[i];
    put_words(from + 16, output, values);
    unit[output] = read16(from + 80);
    unit_of_minima[output] = negated(read16(from + 82));
  }
};

struct IQ4_XS : Scaled<SignedBytes, 8> {
  static constexpr int64_t kFileBytes = 136;
  static constexpr int kMost = 255, kOffset = 128;
  static constexpr bool kMinimum = false;
  Word values[32];  // of 4 words, the low bits, then the high ones

  DotBytes quad(int64_t span, int64_t i, int64_t output) const {
    const DotBytes both = load_word(values[span * 8 + i / 8 * 4 + i % 4], output);
    return look_up(kUneven, nibbles(both, i % 8 >= 4));
  }
  void encode(const uint8_t* from, int64_t, int64_t output) {
    unit[output] = read16(from);
    const int high_bits = read16(from + 2);
    for (int i = 0; i < 8; ++i) {
      const int low = from[4 + i / 2] >> i % 2 * 4 & 15, high = high_bits >> 2 * i & 3;
      multiples[i][output] = static_cast<int8_t>((low | high << 4) - 32);
    }
    put_words(from + 8, output, values);
  }
};

template <class... Formats>
struct List {};

// In the order of kernels/cpu/linear.py.
using AllFormats = List<Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS>;

}  // namespace quantized
}  // namespace
