// What the process keeps of the memory that it was given back.
#pragma once

#include <cstdint>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

namespace {

// XLA takes the memory of a step's intermediate results anew at every step and gives it back after
// it. By glibc's defaults such pieces go back to the system, which clears each page when it is
// touched again: 5 % of the time of a prompt.
__attribute__((constructor)) void keep_memory() {
#if defined(__GLIBC__)
  mallopt(M_MMAP_THRESHOLD, 32 << 20);  // the largest that it takes
  mallopt(M_TRIM_THRESHOLD, 64 << 20);
#endif
}

}  // namespace
