// What can be wrong with the arguments of a finalize call.
#pragma once

#include "specprefill.h"

namespace specprefill {

// Pointers, sizes and options: all that can be seen without reading what the pointers point to.
int check_finalize(const specprefill_finalize& args);

}  // namespace specprefill
