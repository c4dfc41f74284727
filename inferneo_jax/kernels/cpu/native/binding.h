// What all bindings to XLA share. A binding checks shapes and takes buffers apart; a mistake becomes
// an error of the step that called it.
#pragma once

#include "numbers.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

inline ffi::Error invalid(const char* why) {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, why);
}

template <class Buffer>
inline const float* data_or_null(const Buffer& buffer) {
  return buffer.element_count() ? buffer.typed_data() : nullptr;
}

// Calls run with the number format of an element type; false if there is none.
template <class Run>
inline bool with_format(ffi::DataType type, const Run& run) {
  if (type == ffi::F32) return run(Float32{}), true;
  if (type == ffi::BF16) return run(BFloat16{}), true;
  return false;
}

}  // namespace
