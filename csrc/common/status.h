// How a check fails: a code for the caller and a sentence for whoever reads it.
#pragma once

#include "specprefill.h"

namespace specprefill {

// Stores the printf-style message for specprefill_last_error() and returns `code`.
__attribute__((format(printf, 2, 3))) int fail(int code, const char* format, ...);

// Forgets the last message.
void clear_error();

}  // namespace specprefill

// Leaves the function when the condition does not hold.
#define SPECPREFILL_REQUIRE(condition, ...)                                                  \
  do {                                                                                       \
    if (!(condition)) return ::specprefill::fail(SPECPREFILL_INVALID_ARGUMENT, __VA_ARGS__); \
  } while (0)

// Leaves the function with the status of a call that failed.
#define SPECPREFILL_TRY(call)                 \
  do {                                        \
    if (int status_ = (call)) return status_; \
  } while (0)
