// What the parts of the Python module share.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <new>

#include "specprefill.h"

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline void check(int status) {
  if (status == SPECPREFILL_OK) return;
  if (status == SPECPREFILL_OUT_OF_MEMORY) throw std::bad_alloc();
  if (status == SPECPREFILL_CUDA_ERROR) throw std::runtime_error(specprefill_last_error());
  throw pybind11::value_error(specprefill_last_error());
}

// Calls one function of the C interface, while other Python threads run, and raises what it says.
template <class F>
void run(F&& function) {
  int status;
  {
    pybind11::gil_scoped_release release;
    status = function();
  }
  check(status);
}

// Adds the functions that end in _cuda.
void bind_cuda(pybind11::module_& m);
