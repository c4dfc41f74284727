// Attention as XLA calls it: shapes are checked, and buffers taken apart.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "attention.h"
#include "xla/ffi/api/ffi.h"

namespace {
namespace paged {

namespace ffi = xla::ffi;

using Array3 = ffi::BufferR3<ffi::F32>;
using Array5 = ffi::Buffer<ffi::F32, 5>;
using Table = ffi::BufferR2<ffi::S32>;

struct Pages {
  ffi::AnyBuffer keys, values, key_scales, value_scales;
};

inline ffi::Error refuse(const char* why) {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, why);
}

// Fresh entries are [rows, tokens, kv_heads, entries, head_dim]: a group's queries, then, where
// they are to be written, its key and value. Without angles ([0, 0, 0]) nothing is rotated.
inline ffi::Error run_call(ffi::ThreadPool& pool, int64_t group, const Array5& fresh,
                           const Array3& cos, const Array3& sin, const Table& block_tables,
                           const Table& positions, const Pages& pages, float* out) {
  const auto f = fresh.dimensions(), k = pages.keys.dimensions(), t = block_tables.dimensions();
  const auto at = positions.dimensions(), angles = cos.dimensions();
  const bool rotates = cos.element_count() > 0, scaled = pages.key_scales.element_count() > 0;
  if (k.size() != 4 || k[1] != f[2] || k[3] != f[4] || k[2] % kBlock ||
      k[3] % kBlock || k[3] > kMostDims) {
    return refuse("attention: pages must be [pages, kv_heads, 16 n, 16 m], m at most 64");
  }
  if (k[0] < 1 || t[0] != f[0] || at[0] != f[0] || at[1] != f[1]) {
    return refuse("attention: block tables must be [rows, max_pages], positions [rows, tokens]");
  }
  if (f[3] != group && f[3] != group + 2) return refuse("attention: entries must be the group's");
  if (rotates && (angles[0] != f[0] || angles[1] != f[1] || angles[2] * 2 != f[4])) {
    return refuse("attention: angles must be [rows, tokens, head_dim / 2]");
  }
  if (pages.values.element_count() != pages.keys.element_count() ||
      pages.values.element_type() != pages.keys.element_type() ||
      scaled != (pages.keys.element_type() == ffi::S8) ||
      (scaled && (int64_t)pages.key_scales.element_count() != k[0] * k[1] * k[2]) ||
      pages.value_scales.element_count() != pages.key_scales.element_count()) {
    return refuse("attention: values and scales must match the keys");
  }
  const auto size = [](int64_t n) { return static_cast<int>(n); };
  const Call call{
      size(f[0]), size(f[1]), size(f[2]), size(group), size(f[4]), size(k[2]), size(k[0]),
      size(t[1]), fresh.typed_data(), size(f[3]), rotates ? cos.typed_data() : nullptr,
      rotates ? sin.typed_data() : nullptr, block_tables.typed_data(), positions.typed_data(),
      pages.keys.untyped_data(), pages.values.untyped_data(),
      scaled ? pages.key_scales.typed_data<float>() : nullptr,
      scaled ? pages.value_scales.typed_data<float>() : nullptr, out};
  switch (pages.keys.element_type()) {
    case ffi::F32: attention<Float32>(pool, call); break;
    case ffi::BF16: attention<BFloat16>(pool, call); break;
    case ffi::S8: attention<Int8>(pool, call); break;
    default: return refuse("attention: pages must be of float32, bfloat16 or int8");
  }
  return ffi::Error::Success();
}

// Writes fresh keys and values into the pages, given and given back, and attends to them.
inline ffi::Error step_call(ffi::ThreadPool pool, Array5 fresh, Array3 cos, Array3 sin,
                            Table block_tables, Table positions, ffi::AnyBuffer keys,
                            ffi::AnyBuffer values, ffi::AnyBuffer key_scales,
                            ffi::AnyBuffer value_scales, ffi::Result<Array5> out,
                            ffi::Result<ffi::AnyBuffer> new_keys,
                            ffi::Result<ffi::AnyBuffer> new_values,
                            ffi::Result<ffi::AnyBuffer> new_key_scales,
                            ffi::Result<ffi::AnyBuffer> new_value_scales, int64_t group) {
  if (keys.untyped_data() != new_keys->untyped_data() ||
      values.untyped_data() != new_values->untyped_data() ||
      key_scales.untyped_data() != new_key_scales->untyped_data() ||
      value_scales.untyped_data() != new_value_scales->untyped_data()) {
    return refuse("attention: pages must be written in place");
  }
  return run_call(pool, group, fresh, cos, sin, block_tables, positions,
                        {keys, values, key_scales, value_scales}, out->typed_data());
}

// Attends to what the pages hold.
inline ffi::Error attend_call(ffi::ThreadPool pool, Array5 queries, Table block_tables, Table positions,
                              Array3 none, ffi::AnyBuffer keys, ffi::AnyBuffer values,
                              ffi::AnyBuffer key_scales, ffi::AnyBuffer value_scales,
                              ffi::Result<Array5> out) {
  const int64_t group = queries.dimensions()[3];
  return run_call(pool, group, queries, none, none, block_tables, positions,
                        {keys, values, key_scales, value_scales}, out->typed_data());
}

// Pages that nobody has touched: the system hands out memory as they are written, 2 MiB at a time
// where it can, as few of the CPU's address translations reach over many small pieces.
inline ffi::Error pages_call(ffi::RemainingRets arrays, int64_t) {
#if defined(__linux__)
  constexpr uintptr_t kHuge = uintptr_t{1} << 21;
  for (size_t i = 0; i < arrays.size(); ++i) {
    auto array = arrays.get<ffi::AnyBuffer>(i);
    if (!array.has_value()) return array.error();
    const auto begin = reinterpret_cast<uintptr_t>((*array)->untyped_data());
    const uintptr_t first = (begin + kHuge - 1) & ~(kHuge - 1);
    const uintptr_t end = (begin + (*array)->size_bytes()) & ~(kHuge - 1);
    if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
  }
#endif
  return ffi::Error::Success();
}

}  // namespace paged
}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(attention_step, paged::step_call,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<paged::Array5>()
                                  .Arg<paged::Array3>()
                                  .Arg<paged::Array3>()
                                  .Arg<paged::Table>()
                                  .Arg<paged::Table>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<paged::Array5>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<int64_t>("group"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(attention_attend, paged::attend_call,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<paged::Array5>()
                                  .Arg<paged::Table>()
                                  .Arg<paged::Table>()
                                  .Arg<paged::Array3>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<paged::Array5>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(attention_pages, paged::pages_call,
                              xla::ffi::Ffi::Bind().RemainingRets().Attr<int64_t>("layer"));
