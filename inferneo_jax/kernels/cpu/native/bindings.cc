// All kernels as XLA calls them, one symbol each; `build.py` looks them up by name.
//
// A kernel is a header of plain functions over pointers and sizes. Here shapes are checked and
// buffers taken apart: what is wrong becomes an error of the step that called.

#include <cstdint>
#include <string>

#include "attention.h"
#include "linear.h"
#include "pool.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

using Array3 = ffi::BufferR3<ffi::F32>;
using Array5 = ffi::Buffer<ffi::F32, 5>;
using Table = ffi::BufferR2<ffi::S32>;

struct Pages {
  ffi::AnyBuffer keys, values, key_scales, value_scales;
};

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

// Fresh entries are [rows, tokens, kv_heads, entries, head_dim]: a group's queries, then, where they
// are to be written, its key and value. Without angles ([0, 0, 0]) nothing is rotated.
ffi::Error attention_call(ffi::ThreadPool& pool, int64_t group, const Array5& fresh,
                          const Array3& cos, const Array3& sin, const Table& tables,
                          const Table& positions, const Pages& pages, float* out) {
  const auto f = fresh.dimensions(), k = pages.keys.dimensions(), t = tables.dimensions();
  const auto at = positions.dimensions(), angles = cos.dimensions();
  const bool rotates = cos.element_count() > 0, scaled = pages.key_scales.element_count() > 0;
  if (k.size() != 4 || k[1] != f[2] || k[3] != f[4] || k[2] % paged::kBlock ||
      k[3] % paged::kBlock || k[3] > paged::kMostDims) {
    return wrong("attention: pages must be [pages, kv_heads, 16 n, 16 m], m at most 64");
  }
  if (k[0] < 1 || t[0] != f[0] || at[0] != f[0] || at[1] != f[1]) {
    return wrong("attention: tables must be [rows, max_pages], positions [rows, tokens]");
  }
  if (f[3] != group && f[3] != group + 2) return wrong("attention: entries must be the group's");
  if (rotates && (angles[0] != f[0] || angles[1] != f[1] || angles[2] * 2 != f[4])) {
    return wrong("attention: angles must be [rows, tokens, head_dim / 2]");
  }
  if (pages.values.element_count() != pages.keys.element_count() ||
      pages.values.element_type() != pages.keys.element_type() ||
      scaled != (pages.keys.element_type() == ffi::S8) ||
      (scaled && (int64_t)pages.key_scales.element_count() != k[0] * k[1] * k[2]) ||
      pages.value_scales.element_count() != pages.key_scales.element_count()) {
    return wrong("attention: values and scales must match the keys");
  }
  const auto size = [](int64_t n) { return static_cast<int>(n); };
  const paged::Call call{
      size(f[0]), size(f[1]), size(f[2]), size(group), size(f[4]), size(k[2]), size(k[0]),
      size(t[1]), fresh.typed_data(), size(f[3]), rotates ? cos.typed_data() : nullptr,
      rotates ? sin.typed_data() : nullptr, tables.typed_data(), positions.typed_data(),
      pages.keys.untyped_data(), pages.values.untyped_data(),
      scaled ? pages.key_scales.typed_data<float>() : nullptr,
      scaled ? pages.value_scales.typed_data<float>() : nullptr, out};
  switch (pages.keys.element_type()) {
    case ffi::F32: paged::attention<paged::Float32>(pool, call); break;
    case ffi::BF16: paged::attention<paged::BFloat16>(pool, call); break;
    case ffi::S8: paged::attention<paged::Int8>(pool, call); break;
    default: return wrong("attention: pages must be of float32, bfloat16 or int8");
  }
  return ffi::Error::Success();
}

// Writes fresh keys and values into the pages, which it is given and gives back, and attends to them.
ffi::Error step_call(ffi::ThreadPool pool, Array5 fresh, Array3 cos, Array3 sin, Table tables,
                     Table positions, ffi::AnyBuffer keys, ffi::AnyBuffer values,
                     ffi::AnyBuffer key_scales, ffi::AnyBuffer value_scales,
                     ffi::Result<Array5> out, ffi::Result<ffi::AnyBuffer> new_keys,
                     ffi::Result<ffi::AnyBuffer> new_values,
                     ffi::Result<ffi::AnyBuffer> new_key_scales,
                     ffi::Result<ffi::AnyBuffer> new_value_scales, int64_t group) {
  if (keys.untyped_data() != new_keys->untyped_data() ||
      values.untyped_data() != new_values->untyped_data() ||
      key_scales.untyped_data() != new_key_scales->untyped_data() ||
      value_scales.untyped_data() != new_value_scales->untyped_data()) {
    return wrong("attention: pages must be written in place");
  }
  return attention_call(pool, group, fresh, cos, sin, tables, positions,
                        {keys, values, key_scales, value_scales}, out->typed_data());
}

// Attends to what the pages hold.
ffi::Error attend_call(ffi::ThreadPool pool, Array5 queries, Table tables, Table positions,
                       Array3 none, ffi::AnyBuffer keys, ffi::AnyBuffer values,
                       ffi::AnyBuffer key_scales, ffi::AnyBuffer value_scales,
                       ffi::Result<Array5> out) {
  const int64_t group = queries.dimensions()[3];
  return attention_call(pool, group, queries, none, none, tables, positions,
                        {keys, values, key_scales, value_scales}, out->typed_data());
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(attention_step, step_call,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Array5>()
                                  .Arg<Array3>()
                                  .Arg<Array3>()
                                  .Arg<Table>()
                                  .Arg<Table>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<Array5>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("group"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(attention_attend, attend_call,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Array5>()
                                  .Arg<Table>()
                                  .Arg<Table>()
                                  .Arg<Array3>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<Array5>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(linear_int8, linear_call,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::BufferR2<ffi::F32>>()
                                  .Arg<ffi::BufferR4<ffi::U8>>()
                                  .Arg<ffi::BufferR3<ffi::BF16>>()
                                  .Ret<ffi::BufferR2<ffi::F32>>());
