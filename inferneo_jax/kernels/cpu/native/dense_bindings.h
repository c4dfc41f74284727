// Products with floats and attention of segments as XLA calls them: shapes are checked, and buffers
// taken apart.
#pragma once

#include <cstdint>

#include "dense.h"
#include "segment_attention.h"
#include "xla/ffi/api/ffi.h"

namespace {
namespace dense {

namespace ffi = xla::ffi;

using Vector32 = ffi::BufferR1<ffi::F32>;
using Table32 = ffi::BufferR2<ffi::F32>;
using Integers32 = ffi::BufferR1<ffi::S32>;

inline ffi::Error refuse(const char* why) {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, why);
}

template <class Of>
inline const float* data_or_null(const Of& buffer) {
  return buffer.element_count() ? buffer.typed_data() : nullptr;
}

// Calls run with a null pointer to the C++ type of this element type; false if there is none.
template <class Run>
inline bool with_type(ffi::DataType type, const Run& run) {
  if (type == ffi::F32) return run((float*)nullptr), true;
  if (type == ffi::BF16) return run((uint16_t*)nullptr), true;
  return false;
}

// `weights` is [outputs / 32, inputs / pack, 32, pack], `live` [1]: rows behind so many may be
// anything. `bias`, `residual`, `scale` and `shift` may be empty.
inline ffi::Error linear_call(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer weights,
                              Vector32 bias, Table32 residual, Vector32 scale, Vector32 shift,
                              Integers32 live, int64_t gelu, float eps,
                              ffi::Result<ffi::AnyBuffer> out) {
  const auto xs = x.dimensions(), w = weights.dimensions(), o = out->dimensions();
  if (xs.size() != 2 || o.size() != 2 || o[0] != xs[0]) return refuse("x and result are no tables");
  const int64_t inputs = xs[1], outputs = o[1];
  if (w.size() != 4 || w[0] != round_up(outputs, kOutputs) / kOutputs || w[2] != kOutputs) {
    return refuse("the weights are not in blocks of the outputs");
  }
  const auto fits = [&](const Vector32& vector) {
    return !vector.element_count() || (int64_t)vector.element_count() == outputs;
  };
  const bool normal = scale.element_count() > 0;
  if (!fits(bias) || !fits(scale) || shift.element_count() != scale.element_count() ||
      (normal && out->element_type() != ffi::F32)) {
    return refuse("bias or norm do not fit the result");
  }
  if (residual.element_count() && residual.element_count() != out->element_count()) {
    return refuse("the residual has another shape than the result");
  }
  if (live.element_count() != 1) return refuse("live is not one number");
  const int64_t rows = std::clamp<int64_t>(*live.typed_data(), 0, xs[0]);
  const After after{data_or_null(bias), data_or_null(residual), gelu != 0,
                    data_or_null(scale), data_or_null(shift),   eps};
  bool whole = true;
  const auto run = [&](auto format) {
    using F = decltype(format);
    whole = w[1] == whole_packs<F>(inputs) / F::kPack && w[3] == F::kPack;
    if (!whole) return;
    const Matrix<F> matrix{(const typename F::Stored*)weights.untyped_data(), inputs, outputs};
    whole = with_type(x.element_type(), [&](auto* of_x) {
      whole = with_type(out->element_type(), [&](auto* of_out) {
        linear(pool, matrix, after, (decltype(of_x))x.untyped_data(), rows, xs[0],
               (decltype(of_out))out->untyped_data());
      });
    }) && whole;
  };
  if (weights.element_type() == ffi::BF16) {
    run(BFloat16{});
  } else if (weights.element_type() == ffi::F32) {
    run(Float32{});
  } else {
    whole = false;
  }
  return whole ? ffi::Error::Success() : refuse("the weights do not fit x, or a type is unknown");
}

// `fused` is [tokens, 3, heads, dims], `cu_seqlens` [segments + 1], the result [tokens, heads, dims].
inline ffi::Error segments_call(ffi::ThreadPool pool, ffi::AnyBuffer fused, Integers32 cu_seqlens,
                             ffi::Result<ffi::AnyBuffer> out) {
  const auto f = fused.dimensions();
  if (f.size() != 4 || f[1] != 3 || out->element_count() * 3 != fused.element_count() ||
      out->element_type() != fused.element_type() || cu_seqlens.element_count() < 1) {
    return refuse("attention of segments: fused must be [tokens, 3, heads, dims], cu_seqlens [segments + 1]");
  }
  const auto run = [&](auto format) {
    using F = decltype(format);
    using Number = typename F::Stored;
    attend_segments<F>(pool, {(const Number*)fused.untyped_data(), cu_seqlens.typed_data(), f[0],
                           (int64_t)cu_seqlens.element_count() - 1, f[2], f[3],
                           (Number*)out->untyped_data()});
  };
  if (fused.element_type() == ffi::BF16) {
    run(BFloat16{});
  } else if (fused.element_type() == ffi::F32) {
    run(Float32{});
  } else {
    return refuse("attention of segments: neither float32 nor bfloat16");
  }
  return ffi::Error::Success();
}

}  // namespace dense
}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(dense_linear, dense::linear_call,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<dense::Vector32>()
                                  .Arg<dense::Table32>()
                                  .Arg<dense::Vector32>()
                                  .Arg<dense::Vector32>()
                                  .Arg<dense::Integers32>()
                                  .Attr<int64_t>("gelu")
                                  .Attr<float>("eps")
                                  .Ret<xla::ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(segment_attention, dense::segments_call,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<dense::Integers32>()
                                  .Ret<xla::ffi::AnyBuffer>());
