#include "emulation/source_line.h"

#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstring>

namespace emulation {

std::string source_line(const void* return_address) {
  // A return address is behind the call, at times in the next line.
  const auto address = reinterpret_cast<uintptr_t>(return_address) - 1;
  Dl_info module;
  if (!dladdr(reinterpret_cast<const void*>(address), &module) || !module.dli_fname) return "an unknown place";
  char offset[32];
  std::snprintf(offset, sizeof offset, "%#zx",
                static_cast<size_t>(address - reinterpret_cast<uintptr_t>(module.dli_fbase)));
  const std::string path = module.dli_fname;
  const std::string plain = path.substr(path.rfind('/') + 1) + "+" + offset;
  if (path.find('\'') != std::string::npos) return plain;
  std::string line;
  if (FILE* output = popen(("addr2line -e '" + path + "' " + offset + " 2>/dev/null").c_str(), "r")) {
    char text[512];
    if (std::fgets(text, sizeof text, output)) line = text;
    pclose(output);
  }
  line = line.substr(line.rfind('/') + 1);
  line = line.substr(0, line.find_first_of(" \n"));
  return line.empty() || line[0] == '?' ? plain : line;
}

}  // namespace emulation
