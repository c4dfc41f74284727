// The table of block formats, and how their blocks are made.

#include "blocks.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "block_tiles.h"

namespace {
namespace quantized {

template <class... Formats>
const inferneo::BlockFormat& at(List<Formats...>, int64_t number) {
  static constexpr inferneo::BlockFormat kTable[] = {kFunctions<Formats>...};
  return kTable[std::clamp<int64_t>(number, 0, sizeof...(Formats) - 1)];
}

}  // namespace quantized
}  // namespace

namespace inferneo {

const BlockFormat& block_format(int64_t number) {
  return quantized::at(quantized::AllFormats{}, number);
}

}  // namespace inferneo
