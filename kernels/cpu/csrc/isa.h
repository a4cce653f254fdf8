#pragma once
#include "kernel_table.h"

// NULL if this CPU or this build does not have it.
const KernelTable *kernels_for(int32_t isa);
