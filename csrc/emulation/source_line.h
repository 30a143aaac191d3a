// Where an address of code is in the source.
#pragma once

#include <string>

namespace emulation {

// "ptx.cuh:35 in kernel.cuh:120" (a function, and where it is inlined) where the module has debug information and
// addr2line is installed, else "module+0x1234".
std::string source_line(const void* return_address);

}  // namespace emulation
