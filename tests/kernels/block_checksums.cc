// Prints a checksum of the products and weights of every block format, of numbers that are the same on
// every machine: where two CPUs print the same, their kernels give the same bits.

#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <vector>

#include "block_tiles.h"
#include "quantized_rows.h"

namespace {

using namespace quantized;

uint64_t state = 1;
uint32_t random_bits() {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<uint32_t>(state >> 33);
}

uint64_t hash = 0;
void add_to_hash(const float* numbers, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, numbers + i, sizeof bits);
    hash = (hash ^ bits) * 1099511628211u;
  }
}

constexpr int64_t kInputs = 768, kSpans = kInputs / kSpan, kRows = 23;

struct QuantizedInput {
  std::vector<int8_t> values = std::vector<int8_t>(kRows * kInputs);
  std::vector<inferneo::RowSpan> about = std::vector<inferneo::RowSpan>(kRows * kSpans);

  QuantizedInput() {
    for (int64_t i = 0; i < kRows * kSpans; ++i) {
      const int64_t at = i % kSpans * kRows + i / kSpans;
      Floats16 x[kSpan / 16], gate, up;
      for (auto& vector : x) {
        for (int i = 0; i < 16; ++i) {
          gate[i] = static_cast<float>(random_bits()) * 4e-9f - 4;
          up[i] = static_cast<float>(random_bits()) * 1e-9f - 1;
        }
        swiglu(gate, up, vector);
      }
      quantize_span(x, values.data() + at * kSpan, about[at]);
    }
  }
};

template <class F>
void check(const QuantizedInput& input) {
  // Any bytes, but those of scales are not to be infinite: the highest bit of an exponent is 0.
  const int64_t row_bytes = kInputs / F::kFileInputs * F::kFileBytes;
  std::vector<uint8_t> file(kBlock * row_bytes);
  for (auto& byte : file) byte = static_cast<uint8_t>(random_bits());
  for (size_t block = 0; block < file.size(); block += F::kFileBytes) {
    const bool scales_last = F::kFileBytes == 84 || F::kFileBytes == 110 || F::kFileBytes == 210;
    const size_t first = block + (scales_last ? F::kFileBytes - (F::kMinimum ? 4 : 2) : 0);
    for (size_t at = first; at < first + (F::kMinimum ? 4 : 2); at += 2) file[at + 1] &= 0xbf;
  }
  const uint8_t* rows[kBlock];
  for (int64_t n = 0; n < kBlock; ++n) rows[n] = file.data() + n * row_bytes;
  std::vector<F> block(kInputs / F::kInputs);
  auto* const bytes = reinterpret_cast<uint8_t*>(block.data());
  encode<F>(rows, 1, row_bytes, bytes);

  hash = 14695981039346656037u;
  const QuantizedRows quantized{input.values.data(), input.about.data(), kSpans, kRows};
  alignas(64) float totals[kRows][kBlock];
  for (int64_t count = 1; count <= kRows; ++count) {
    multiply<F>(bytes, quantized, count, totals);
    add_to_hash(totals[0], count * kBlock);
  }
  float weights[kInputs];
  for (int64_t n = 0; n < kBlock; ++n) {
    take<F>(bytes, kSpans, n, weights);
    add_to_hash(weights, kInputs);
  }
  std::printf("%" PRId64 " %016" PRIx64 "\n", F::kFileBytes, hash);
}

template <class... Formats>
void check_all(List<Formats...>) {
  const QuantizedInput input;
  (check<Formats>(input), ...);
}

}  // namespace

int main() { check_all(AllFormats{}); }
