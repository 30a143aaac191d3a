// The copies of gather_tokens, for select_tokens too, whose indices need no check.
#pragma once

#include "specprefill.h"

namespace specprefill {

// The arguments have been checked, and so has what the pointers point to.
void gather_tokens(const specprefill_gather_tokens& args, int num_threads);

}  // namespace specprefill
