// How much freed memory the process keeps.

#include <cstdlib>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

namespace {

// XLA allocates the intermediate results of a step in every step and frees them after it. By
// glibc's defaults such blocks return to the system, which clears each page when it is touched
// again: 5 % of the time of a prompt.
__attribute__((constructor)) void keep_memory() {
#if defined(__GLIBC__)
  mallopt(M_MMAP_THRESHOLD, 32 << 20);  // the largest value it accepts
  mallopt(M_TRIM_THRESHOLD, 64 << 20);
#endif
}

}  // namespace
