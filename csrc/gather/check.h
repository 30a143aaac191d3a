// What can be wrong with the arguments of the gathers: all that can be seen without reading what the pointers point to.
#pragma once

#include "specprefill.h"

namespace specprefill {

int check_gather_tokens(const specprefill_gather_tokens& args);
int check_gather_kv(const specprefill_gather_kv& args);

}  // namespace specprefill
