// A test runs kernels and says what was wrong: an error of the launch, or a result that is not the expected one.
#pragma once

#include <string>
#include <vector>

#include "common/device.cuh"
#include "common/jobs.cuh"
#include "common/ptx.cuh"

struct Test {
  const char* name;
  std::string (*run)();
};

// Kernels with a fault, and with the same without it.
std::vector<Test> faults();
std::vector<Test> faults_between_blocks();
std::vector<Test> twins();
std::vector<Test> twins_between_blocks();
// What works.
std::vector<Test> warps();
std::vector<Test> blocks();
std::vector<Test> arithmetic();

// The error of a launch; "" if there was none.
template <class F>
std::string launched(dim3 grid, unsigned threads, size_t shared_bytes, F kernel) {
  emulation::launch(grid, dim3(threads), shared_bytes, kernel);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

// "" or the first element that is not as expected.
template <class T>
std::string differs(const std::vector<T>& got, const std::vector<T>& expected) {
  for (size_t i = 0; i < expected.size(); ++i) {
    if (got[i] == expected[i]) continue;
    return "wrong result: [" + std::to_string(i) + "] is " + std::to_string(got[i]) + ", expected " +
           std::to_string(expected[i]);
  }
  return "";
}
