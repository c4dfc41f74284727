// Attention as XLA calls it. A source of its own, for compilers to work side by side.

#include "attention_bindings.h"
