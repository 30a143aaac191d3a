// The CUDA part of the Python module: the same argument structs, device addresses in them, and a stream as an integer.
#include <string>
#include <vector>

#include "bindings.h"
#include "common/cuda_info.h"

namespace py = pybind11;

void bind_cuda(py::module_& m) {
  m.def("cuda_unavailable", [] { return std::string(specprefill_cuda_unavailable()); });
  m.def("cuda_architectures", [] { return std::string(specprefill_cuda_architectures()); });
  // "" or why none of these architectures runs on a GPU of this capability.
  m.def("cuda_no_code_for", [](const char* architectures, int major, int minor) {
    const int status = specprefill::check_capability(architectures, major, minor);
    return std::string(status == SPECPREFILL_OK ? "" : specprefill_last_error());
  });
  m.def("score_workspace_size_cuda", &specprefill_score_workspace_size_cuda);
  m.def("score_layers_cuda", [](const specprefill_score& args, const std::vector<specprefill_layer>& layers,
                                uintptr_t workspace, size_t workspace_bytes, uintptr_t stream) {
    run([&] {
      return specprefill_score_layers_cuda(&args, layers.data(), static_cast<int64_t>(layers.size()),
                                           pointer<void>(workspace), workspace_bytes, pointer<void>(stream));
    });
  });
  m.def("finalize_cuda", [](const specprefill_finalize& args, uintptr_t stream) {
    run([&] { return specprefill_finalize_cuda(&args, pointer<void>(stream)); });
  });
  m.def("select_workspace_size_cuda", &specprefill_select_workspace_size_cuda);
  m.def("select_cuda",
        [](const specprefill_select& args, uintptr_t workspace, size_t workspace_bytes, uintptr_t stream) {
          run([&] {
            return specprefill_select_cuda(&args, pointer<void>(workspace), workspace_bytes, pointer<void>(stream));
          });
        });
  m.def("gather_tokens_cuda", [](const specprefill_gather_tokens& args, uintptr_t stream) {
    run([&] { return specprefill_gather_tokens_cuda(&args, pointer<void>(stream)); });
  });
  m.def("gather_kv_cuda", [](const std::vector<specprefill_gather_kv>& caches, uintptr_t stream) {
    run([&] {
      return specprefill_gather_kv_cuda(caches.data(), static_cast<int64_t>(caches.size()), pointer<void>(stream));
    });
  });
  m.def("select_tokens_cuda",
        [](const specprefill_finalize& finalize, const specprefill_select& select,
           const specprefill_gather_tokens& gather, uintptr_t workspace, size_t workspace_bytes, uintptr_t stream) {
          run([&] {
            return specprefill_select_tokens_cuda(&finalize, &select, &gather, pointer<void>(workspace),
                                                  workspace_bytes, pointer<void>(stream));
          });
        });
}
