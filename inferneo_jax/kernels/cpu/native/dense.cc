// Products of floats and attention within texts as XLA calls them. A source of its own, for
// compilers to work side by side.

#include "dense_bindings.h"
