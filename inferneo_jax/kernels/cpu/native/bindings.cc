// All kernels as XLA calls them, one symbol each; `build.py` looks them up by name.
//
// A kernel is a header of plain functions over pointers and sizes. Here shapes are checked and
// buffers taken apart: what is wrong becomes an error of the step that called.

#include <cstdint>
#include <string>

#include "attention_bindings.h"
#include "linear.h"
#include "pool.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

ffi::Error wrong(const char* what) {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, what);
}

ffi::Error linear_int8_call(ffi::ThreadPool pool, ffi::BufferR2<ffi::F32> x,
                            ffi::BufferR4<ffi::U8> values, ffi::BufferR3<ffi::BF16> scales,
                            ffi::BufferR1<ffi::F32> norm, ffi::BufferR2<ffi::F32> residual,
                            int64_t prologue, float eps, ffi::ResultBufferR2<ffi::F32> out) {
  const auto v = values.dimensions(), s = scales.dimensions(), o = out->dimensions();
  const int64_t rows = x.dimensions()[0], inputs = v[1] * 4;
  const int64_t width = x.dimensions()[1] / (prologue == Around::kSwiGlu ? 2 : 1);
  if (v[2] != kBlock || v[3] != 4 || s[0] != v[0] || s[2] != kBlock) {
    return wrong("values must be [blocks, inputs / 4, 32, 4], scales [blocks, groups, 32]");
  }
  if (s[1] < 1 || inputs % (kLanes * s[1])) return wrong("groups must be multiples of 16 inputs");
  if (width > inputs || o[0] != rows || o[1] > v[0] * kBlock) {
    return wrong("x has more columns than the matrix, or the result another shape");
  }
  if (prologue == Around::kRmsNorm && norm.element_count() != static_cast<size_t>(width)) {
    return wrong("the norm has another width than x");
  }
  const bool added = residual.element_count() > 0;
  if (added && residual.element_count() != out->element_count()) {
    return wrong("the residual has another shape than the result");
  }
  const Around around{static_cast<Around::Prologue>(prologue), norm.typed_data(), eps,
                      added ? residual.typed_data() : nullptr};
  const Matrix matrix{values.typed_data(),
                      reinterpret_cast<const uint16_t*>(scales.untyped_data()), inputs, o[1],
                      inputs / s[1]};
  linear(pool, matrix, around, x.typed_data(), rows, width, out->typed_data());
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(linear_int8, linear_int8_call,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::BufferR2<ffi::F32>>()
                                  .Arg<ffi::BufferR4<ffi::U8>>()
                                  .Arg<ffi::BufferR3<ffi::BF16>>()
                                  .Arg<ffi::BufferR1<ffi::F32>>()
                                  .Arg<ffi::BufferR2<ffi::F32>>()
                                  .Attr<int64_t>("prologue")
                                  .Attr<float>("eps")
                                  .Ret<ffi::BufferR2<ffi::F32>>());
