// emulation_tests right: every test that must pass. emulation_tests wrong [NAME]: every kernel with a fault, or one.
// Prints a line for each: its name, a tab, and what was wrong.
#include <cstdio>
#include <cstring>

#include "tests.h"

namespace {

void run(const std::vector<Test>& tests, const char* only) {
  for (const Test& test : tests) {
    if (only && std::strcmp(only, test.name)) continue;
    std::printf("%s\t%s\n", test.name, test.run().c_str());
    std::fflush(stdout);
  }
}

}  // namespace

int main(int count, char** arguments) {
  const bool wrong = count > 1 && !std::strcmp(arguments[1], "wrong");
  if (!wrong && (count < 2 || std::strcmp(arguments[1], "right"))) {
    std::fprintf(stderr, "emulation_tests right|wrong [NAME]\n");
    return 2;
  }
  const char* only = count > 2 ? arguments[2] : nullptr;
  if (wrong) {
    run(faults(), only);
    run(faults_between_blocks(), only);
  } else {
    for (const auto& tests : {twins(), twins_between_blocks(), warps(), blocks(), arithmetic()}) run(tests, only);
  }
  return 0;
}
