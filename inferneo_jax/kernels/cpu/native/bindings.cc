// Products as XLA calls them, one symbol each; `build.py` looks them up by name.
//
// A kernel is a header of plain functions over pointers and sizes. Here shapes are checked and
// buffers taken apart: what is wrong becomes an error of the step that called.

#include <cstdint>

#include "feed_forward.h"
#include "linear.h"
#include "memory.h"
#include "pool.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

using Vector = ffi::BufferR1<ffi::F32>;
using Table = ffi::BufferR2<ffi::F32>;

ffi::Error wrong(const char* what) {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, what);
}

// `weights` is `[blocks, groups, bytes of a Group]`; `norm` and `residual` may be empty.
template <typename Group>
ffi::Error linear_call(ffi::ThreadPool pool, Table x, ffi::BufferR3<ffi::U8> weights, Vector norm,
                       Table residual, int64_t prologue, float eps,
                       ffi::ResultBufferR2<ffi::F32> out) {
  const auto w = weights.dimensions(), o = out->dimensions();
  const int64_t rows = x.dimensions()[0], inputs = w[1] * kGroup;
  const int64_t width = x.dimensions()[1] / (prologue == Around::kSwiGlu ? 2 : 1);
  if (w[2] != sizeof(Group) || inputs % kSpan) return wrong("the weights have another layout");
  if (width > inputs || o[0] != rows || o[1] > w[0] * kBlock) {
    return wrong("x has more columns than the matrix, or the result another shape");
  }
  if (prologue == Around::kRmsNorm && static_cast<int64_t>(norm.element_count()) != width) {
    return wrong("the norm has another width than x");
  }
  const bool added = residual.element_count() > 0;
  if (added && residual.element_count() != out->element_count()) {
    return wrong("the residual has another shape than the result");
  }
  const Matrix<Group> matrix{reinterpret_cast<const Group*>(weights.typed_data()), inputs, o[1]};
  const Around around{static_cast<Around::Prologue>(prologue), norm.typed_data(), eps,
                      added ? residual.typed_data() : nullptr};
  linear(pool, matrix, around, x.typed_data(), rows, width, out->typed_data());
  return ffi::Error::Success();
}

template <typename Group>
ffi::Error feed_forward_call(ffi::ThreadPool pool, Table x, ffi::BufferR3<ffi::U8> gate_up,
                             ffi::BufferR3<ffi::U8> down, Vector norm, float eps,
                             ffi::ResultBufferR2<ffi::F32> out) {
  const auto first = gate_up.dimensions(), second = down.dimensions(), o = out->dimensions();
  const int64_t rows = o[0], width = o[1];
  if (first[2] != sizeof(Group) || second[2] != sizeof(Group)) {
    return wrong("the weights have another layout");
  }
  const Matrix<Group> up{reinterpret_cast<const Group*>(gate_up.typed_data()), first[1] * kGroup,
                         first[0] * kBlock};
  const Matrix<Group> back{reinterpret_cast<const Group*>(down.typed_data()), second[1] * kGroup,
                           width};
  if (up.inputs % kSpan || back.inputs % kSpan || up.outputs != 2 * back.inputs) {
    return wrong("gates and ups must be of whole spans, and as many as the second matrix takes");
  }
  if (x.dimensions()[0] != rows || x.dimensions()[1] != width || width > up.inputs ||
      width > second[0] * kBlock || static_cast<int64_t>(norm.element_count()) != width) {
    return wrong("x, the norm and the result must be as wide as the matrices");
  }
  const Around around{Around::kRmsNorm, norm.typed_data(), eps, x.typed_data()};
  feed_forward(pool, up, back, around, x.typed_data(), rows, out->typed_data());
  return ffi::Error::Success();
}

ffi::Error take_call(ffi::BufferR1<ffi::S32> ids, ffi::BufferR3<ffi::U8> weights,
                     ffi::ResultBufferR2<ffi::F32> out) {
  const auto w = weights.dimensions(), o = out->dimensions();
  const int64_t count = ids.dimensions()[0], inputs = w[1] * kGroup;
  if (w[2] != sizeof(Bits8)) return wrong("the table has another layout");
  if (o[0] != count || o[1] != inputs) return wrong("the result has another shape");
  const Matrix<Bits8> matrix{reinterpret_cast<const Bits8*>(weights.typed_data()), inputs,
                             w[0] * kBlock};
  take(matrix, ids.typed_data(), count, out->typed_data());
  return ffi::Error::Success();
}

auto linear_binding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<Table>()
      .Arg<ffi::BufferR3<ffi::U8>>()
      .Arg<Vector>()
      .Arg<Table>()
      .Attr<int64_t>("prologue")
      .Attr<float>("eps")
      .Ret<Table>();
}

auto feed_forward_binding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<Table>()
      .Arg<ffi::BufferR3<ffi::U8>>()
      .Arg<ffi::BufferR3<ffi::U8>>()
      .Arg<Vector>()
      .Attr<float>("eps")
      .Ret<Table>();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(linear_8, linear_call<Bits8>, linear_binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(linear_4, linear_call<Bits4>, linear_binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(feed_forward_8, feed_forward_call<Bits8>, feed_forward_binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(feed_forward_4, feed_forward_call<Bits4>, feed_forward_binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    take_8, take_call,
    ffi::Ffi::Bind().Arg<ffi::BufferR1<ffi::S32>>().Arg<ffi::BufferR3<ffi::U8>>().Ret<Table>());
