// A feed-forward block in one call: `x + down(silu(gate(norm(x))) * up(norm(x)))`.
//
// What lies between the products is quantized where it is made, 64 outputs of a few rows at a time:
// it is never written as floats, which are 8 times as many bytes. The bits are those of two calls.
#pragma once

#include <cstdint>

#include "linear.h"

namespace {

// Rows from `first` on times the gates and ups of span number `span`, as that span of `gated`. The
// matrix's outputs are all gates, then all ups.
template <typename Group, int kCount>
inline void gate_rows(const Matrix<Group>& matrix, int64_t span, const Rows& rows, int64_t first,
                      const QuantizedRows& gated) {
  constexpr int64_t kBlocks = kSpan / kBlock, kVectors = kBlock / kStride;
  alignas(64) float totals[2][kBlocks][kCount][kBlock];
  for (int64_t part = 0; part < 2; ++part) {
    for (int64_t i = 0; i < kBlocks; ++i) {
      const int64_t block = part * (gated.inputs / kBlock) + span * kBlocks + i;
      multiply_tile<Group, kCount>(matrix.groups + block * matrix.spans() * 2, matrix.spans(), rows,
                                   totals[part][i]);
    }
  }
  for (int64_t r = 0; r < kCount; ++r) {
    Floats16 x[kSpan / kStride];
    UNROLL for (int64_t i = 0; i < kSpan / kStride; ++i) {
      Floats16 gate, up;
      load16(totals[0][i / kVectors][r] + i % kVectors * kStride, gate);
      load16(totals[1][i / kVectors][r] + i % kVectors * kStride, up);
      swiglu(gate, up, x[i]);
    }
    gated.put(first + r, span, x);
  }
}

// `x` and `out` are `[rows, down.outputs]`; `around` is the norm, and `x` what it adds.
template <typename Group>
void feed_forward(xla::ffi::ThreadPool& pool, const Matrix<Group>& gate_up,
                  const Matrix<Group>& down, const Around& around, const float* x, int64_t rows,
                  float* out) {
  thread_local Quantized kept, kept_between;
  const LiveRows live = leave_padding(x, rows, down.outputs, around.residual, down.outputs, out,
                                      kept.names(rows));
  const QuantizedRows normal = kept.reserve(live.count, gate_up.inputs);
  const QuantizedRows gated = kept_between.reserve(live.count, down.inputs);
  quantize(pool, around, x, live, down.outputs, normal);
  share(pool, down.spans(), [&](int64_t span) {
    for (int64_t begin = 0; begin < live.count; begin += kNearRows) {
      for_tiles(begin, std::min(live.count, begin + kNearRows), [&](int64_t first, auto count) {
        gate_rows<Group, decltype(count)::value>(gate_up, span, normal.from(first), first, gated);
      });
    }
  });
  multiply(pool, down, gated, live, around.residual, out);
}

}  // namespace
