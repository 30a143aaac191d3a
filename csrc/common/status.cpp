#include "common/status.h"

#include <cstdarg>
#include <cstdio>

namespace specprefill {
namespace {
thread_local char last_error[512] = "";
}

int fail(int code, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(last_error, sizeof last_error, format, arguments);
  va_end(arguments);
  return code;
}

void clear_error() { last_error[0] = '\0'; }

}  // namespace specprefill

const char* specprefill_last_error(void) { return specprefill::last_error; }
