#include "emulation/source_line.h"

#include <dlfcn.h>

#include <cstdint>
#include <cstdio>

namespace emulation {

std::string source_line(const void* return_address) {
  // A return address is behind the call, at times in the next line.
  const auto address = reinterpret_cast<uintptr_t>(return_address) - 1;
  Dl_info module;
  if (!dladdr(reinterpret_cast<const void*>(address), &module) || !module.dli_fname) return "an unknown place";
  char offset[32];
  std::snprintf(offset, sizeof offset, "%#zx",
                static_cast<size_t>(address - reinterpret_cast<uintptr_t>(module.dli_fbase)));
  static const std::string own = "/emulation/";
  const std::string path = module.dli_fname;
  const std::string plain = path.substr(path.rfind('/') + 1) + "+" + offset;
  if (path.find('\'') != std::string::npos) return plain;
  // The innermost function first. Those of the emulation itself are what every thread calls: the line that calls them
  // says more.
  std::string lines;
  if (FILE* output = popen(("addr2line -i -e '" + path + "' " + offset + " 2>/dev/null").c_str(), "r")) {
    char text[1024];
    for (int count = 0; count < 3 && std::fgets(text, sizeof text, output);) {
      std::string line = text;
      line = line.substr(0, line.find_first_of(" \n"));
      const size_t name = line.rfind('/') + 1;
      if (line[0] == '?') continue;
      if (name >= own.size() && line.compare(name - own.size(), own.size(), own) == 0) continue;
      lines += (count++ ? " in " : "") + line.substr(name);
    }
    while (std::fgets(text, sizeof text, output)) {
    }
    pclose(output);
  }
  return lines.empty() ? plain : lines;
}

}  // namespace emulation
