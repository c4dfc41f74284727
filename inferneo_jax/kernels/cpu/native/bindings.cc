// All kernels as XLA calls them, one symbol each; `build.py` looks them up by name.
//
// A kernel is a header of plain functions over pointers and sizes. Here shapes are checked and
// buffers taken apart: what is wrong becomes an error of the step that called.

#include <cstdint>
#include <string>

#include "linear.h"
#include "pool.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

using Floats = ffi::Buffer<ffi::F32>;

ffi::Error wrong(const char* what) {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, what);
}

ffi::Error linear_call(ffi::ThreadPool pool, ffi::BufferR2<ffi::F32> x,
                       ffi::BufferR4<ffi::U8> values, ffi::BufferR3<ffi::BF16> scales,
                       ffi::ResultBufferR2<ffi::F32> out) {
  const auto v = values.dimensions(), s = scales.dimensions(), o = out->dimensions();
  const int64_t rows = x.dimensions()[0], width = x.dimensions()[1];
  const int64_t inputs = v[1] * 4;
  if (v[2] != kBlock || v[3] != 4 || s[0] != v[0] || s[2] != kBlock) {
    return wrong("linear: values must be [blocks, inputs / 4, 32, 4], scales [blocks, groups, 32]");
  }
  if (s[1] < 1 || inputs % (4 * s[1])) return wrong("linear: groups must divide the inputs");
  if (width > inputs || o[0] != rows || o[1] > v[0] * kBlock) {
    return wrong("linear: x or the result has more than the matrix");
  }
  const Matrix matrix{values.typed_data(),
                      reinterpret_cast<const uint16_t*>(scales.untyped_data()), inputs, o[1],
                      inputs / s[1]};
  linear(pool, matrix, x.typed_data(), rows, width, out->typed_data());
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(linear_int8, linear_call,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::BufferR2<ffi::F32>>()
                                  .Arg<ffi::BufferR4<ffi::U8>>()
                                  .Arg<ffi::BufferR3<ffi::BF16>>()
                                  .Ret<ffi::BufferR2<ffi::F32>>());
