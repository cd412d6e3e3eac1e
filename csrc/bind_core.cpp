// tml_kernels._core: host code. Always built.
#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["compiler"] = TML_COMPILER;
  info["cxx_standard"] = __cplusplus;
#ifdef NDEBUG
  info["build_type"] = "release";
#else
  info["build_type"] = "debug";
#endif
  info["flags"] = TML_FLAGS;
#ifdef TML_CUDA_ARCHS
  info["cuda_archs"] = py::str(TML_CUDA_ARCHS).attr("split")(";");
#else
  info["cuda_archs"] = py::none();
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "Host code of tml_kernels.";
  m.def("build_info", &build_info, "How this build was made: compiler, flags, CUDA architectures.");
}
