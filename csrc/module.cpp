// The extension module spectralx_kernels._C: registers the kernels it is linked with (each file
// under cpu/ and cuda/ does so in its own TORCH_LIBRARY_IMPL), differentiates the operators declared in
// Python and tells how it was built.
#include "autograd.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include <string>

#ifndef SPECTRALX_ARCHITECTURES
#define SPECTRALX_ARCHITECTURES ""
#endif

namespace {

pybind11::dict build_info() {
  pybind11::dict info;
  info["torch"] = TORCH_VERSION;
#if defined(__clang__) || defined(__GNUC__)
  info["compiler"] = __VERSION__;
#elif defined(_MSC_VER)
  info["compiler"] = "MSVC " + std::to_string(_MSC_VER);
#endif
#ifdef SPECTRALX_CUDA
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
  info["cuda_architectures"] = SPECTRALX_ARCHITECTURES;
#ifdef SPECTRALX_NATIVE
  info["native"] = true;
#else
  info["native"] = false;
#endif
#ifdef NDEBUG
  info["debug"] = false;
#else
  info["debug"] = true;
#endif
  return info;
}

// Whether the processor is one that MKL has its fastest kernels for.
bool is_intel() {
#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
  return __builtin_cpu_is("intel") != 0;
#else
  return false;
#endif
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Compiled kernels of spectralx_kernels.";
  m.def("build_info", &build_info, "How this module was built: a dict.");
  m.def("is_intel", &is_intel, "Whether this processor is Intel's.");
  m.def(
      "differentiate",
      [](const std::string& name, const std::string& overload, int64_t hidden,
         const std::vector<int64_t>& constant, const std::vector<int64_t>& outputs,
         std::optional<int64_t> only_if,
         const std::map<int64_t, std::vector<int64_t>>& read_for) {
        spectralx::differentiate(name, overload, {hidden, constant, outputs, only_if, read_for});
      },
      "Differentiates spectralx::<name>.<overload> by <name>_backward.<overload>; see _autograd.Kept.",
      pybind11::arg("name"), pybind11::arg("overload"), pybind11::kw_only(),
      pybind11::arg("hidden"), pybind11::arg("constant"), pybind11::arg("outputs"),
      pybind11::arg("only_if"), pybind11::arg("read_for"));
}
