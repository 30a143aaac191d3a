// Where an address of code is in the source.
#pragma once

#include <string>

namespace emulation {

// "kernel.cuh:120" where the module has debug information and addr2line is installed, else "module+0x1234".
std::string source_line(const void* return_address);

}  // namespace emulation
