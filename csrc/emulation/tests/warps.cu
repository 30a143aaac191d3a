// Shuffles, votes, reductions and tensor cores.
#include <cmath>

#include "tests.h"

using namespace specprefill;

namespace {

// Each lane's result against `of(lane)`.
template <class K, class F>
std::string check(K kernel, F of) {
  std::vector<long long> out(64, -1), expected(64);
  for (int i = 0; i < 64; ++i) expected[i] = of(i % 32) + (i >= 32 ? 1000 : 0);
  const std::string error =
      launched(1, 64, 0, [&] { out[threadIdx.x] = kernel(int(threadIdx.x % 32)) + (threadIdx.x >= 32 ? 1000 : 0); });
  return error.empty() ? differs(out, expected) : error;
}

std::string shuffles() {
  std::string problem;
  const auto also = [&](const char* what, const std::string& error) {
    if (problem.empty() && !error.empty()) problem = std::string(what) + ": " + error;
  };
  also("broadcast", check([](int lane) { return __shfl_sync(kAllLanes, lane * lane, 7); }, [](int) { return 49; }));
  also("of segments",
       check([](int lane) { return __shfl_sync(kAllLanes, lane, 5, 8); }, [](int lane) { return lane / 8 * 8 + 5; }));
  also("source beyond the width",
       check([](int lane) { return __shfl_sync(kAllLanes, lane, 13, 8); }, [](int lane) { return lane / 8 * 8 + 5; }));
  also("xor", check([](int lane) { return __shfl_xor_sync(kAllLanes, lane, 12); }, [](int lane) { return lane ^ 12; }));
  also("up", check([](int lane) { return __shfl_up_sync(kAllLanes, lane, 3); },
                   [](int lane) { return lane < 3 ? lane : lane - 3; }));
  also("down in segments", check([](int lane) { return __shfl_down_sync(kAllLanes, lane, 3, 16); },
                                 [](int lane) { return lane % 16 + 3 < 16 ? lane + 3 : lane; }));
  also("8 bytes", check([](int lane) { return __shfl_sync(kAllLanes, (1ll << 40) * lane, 9); },
                        [](int) { return (1ll << 40) * 9; }));
  also("half a warp", check([](int lane) { return __shfl_xor_sync(lane < 16 ? 0xffffu : 0xffff0000u, lane, 15); },
                            [](int lane) { return lane ^ 15; }));
  return problem;
}

std::string votes() {
  std::string problem;
  const auto also = [&](const char* what, const std::string& error) {
    if (problem.empty() && !error.empty()) problem = std::string(what) + ": " + error;
  };
  also("ballot", check([](int lane) { return (long long)__ballot_sync(kAllLanes, lane % 3 == 0); },
                       [](int) { return 0x49249249ll; }));
  also("ballot of some",
       check([](int lane) { return (long long)(lane % 2 ? __ballot_sync(0xaaaaaaaau, lane > 20) : 0); },
             [](int lane) { return lane % 2 ? 0xaaa00000ll : 0; }));
  also("any", check([](int lane) { return __any_sync(kAllLanes, lane == 31); }, [](int) { return 1; }));
  also("not any", check([](int lane) { return __any_sync(kAllLanes, lane == 32); }, [](int) { return 0; }));
  also("all", check([](int lane) { return __all_sync(kAllLanes, lane < 32); }, [](int) { return 1; }));
  also("not all", check([](int lane) { return __all_sync(kAllLanes, lane < 31); }, [](int) { return 0; }));
  also("match", check([](int lane) { return (long long)__match_any_sync(kAllLanes, lane % 4); },
                      [](int lane) { return 0x11111111ll << lane % 4; }));
  also("add", check([](int lane) { return __reduce_add_sync(kAllLanes, lane); }, [](int) { return 496; }));
  also("min", check([](int lane) { return __reduce_min_sync(kAllLanes, 5 - lane); }, [](int) { return -26; }));
  also("max", check([](int lane) { return (long long)__reduce_max_sync(kAllLanes, lane ? unsigned(lane) : ~0u); },
                    [](int) { return 0xffffffffll; }));
  also("or", check([](int lane) { return (long long)__reduce_or_sync(kAllLanes, 1u << lane / 2); },
                   [](int) { return 0xffffll; }));
  // Lanes that have exited need not come.
  also("after exits", check(
                          [](int lane) {
                            if (lane < 8) return (long long)lane;
                            return (long long)__ballot_sync(0xffffff00u, 1);
                          },
                          [](int lane) { return lane < 8 ? lane : 0xffffff00ll; }));
  return problem;
}

std::string exited_lanes() {
  std::vector<long long> out(32), expected(32);
  for (int lane = 0; lane < 32; ++lane) expected[lane] = lane % 2 ? 0xaaaaaaaall : 0;
  const std::string error = launched(1, 32, 0, [&] {
    if (threadIdx.x % 2 == 0) return;
    out[threadIdx.x] = __ballot_sync(kAllLanes, 1);
  });
  return error.empty() ? differs(out, expected) : error;
}

// Inclusive sums of many warps at once.
std::string scan() {
  constexpr unsigned kWarps = 8;
  std::vector<int> out(2 * 32 * kWarps), expected(out.size());
  for (size_t i = 0; i < out.size(); ++i) expected[i] = int(i % 32 * (i % 32 + 1) / 2);
  const std::string error = launched(2, 32 * kWarps, 0, [&] {
    const int lane = threadIdx.x % 32;
    int sum = lane;
    for (int step = 1; step < 32; step *= 2) {
      const int left = __shfl_up_sync(kAllLanes, sum, unsigned(step));
      if (lane >= step) sum += left;
    }
    out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
  });
  return error.empty() ? differs(out, expected) : error;
}

// c [16, 8] += a [16, 16] * b [16, 8] of small integers, which every order of sums gives exactly; a and b differ in
// every element, so that one in a wrong place shows.
template <bool kBf16>
std::string mma() {
  float a[16][16], b[16][8];
  std::vector<float> out(16 * 8), expected(16 * 8);
  for (int i = 0; i < 16; ++i) {
    for (int k = 0; k < 16; ++k) a[i][k] = float((i * 7 + k * 3) % 23 - 11);
    for (int j = 0; j < 8; ++j) b[i][j] = float((i * 5 + j * 11) % 19 - 9);
  }
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 8; ++j) {
      float sum = float(i - j);
      for (int k = 0; k < 16; ++k) sum += a[i][k] * b[k][j];
      expected[i * 8 + j] = sum;
    }
  }
  const std::string error = launched(1, 32, 0, [&] {
    const int g = int(threadIdx.x) / 4, t = int(threadIdx.x) % 4;
    const auto pack = [](float low, float high) { return kBf16 ? pack_bf16(low, high) : pack_f16(low, high); };
    const uint32_t fragment[4] = {pack(a[g][2 * t], a[g][2 * t + 1]), pack(a[g + 8][2 * t], a[g + 8][2 * t + 1]),
                                  pack(a[g][2 * t + 8], a[g][2 * t + 9]),
                                  pack(a[g + 8][2 * t + 8], a[g + 8][2 * t + 9])};
    const uint32_t b0 = pack(b[2 * t][g], b[2 * t + 1][g]), b1 = pack(b[2 * t + 8][g], b[2 * t + 9][g]);
    float c[4] = {float(g - 2 * t), float(g - 2 * t - 1), float(g + 8 - 2 * t), float(g + 8 - 2 * t - 1)};
    if (kBf16) {
      mma_bf16(c, fragment, b0, b1);
    } else {
      mma_f16(c, fragment, b0, b1);
    }
    for (int i = 0; i < 4; ++i) out[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = c[i];
  });
  return error.empty() ? differs(out, expected) : error;
}

}  // namespace

std::vector<Test> warps() {
  return {{"shuffles", shuffles}, {"votes", votes},        {"exited lanes", exited_lanes},
          {"scan", scan},         {"mma bf16", mma<true>}, {"mma f16", mma<false>}};
}
