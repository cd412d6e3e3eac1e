// tml_kernels._cuda: built when nvcc is found. Takes raw pointers and handles; knows no torch.
#include <pybind11/pybind11.h>

#include <memory>

#include "common/check.h"
#include "common/stream_read.cuh"
#include "tick/graph_launch.h"

namespace py = pybind11;

namespace {

template <typename T>
T handle_of(uintptr_t value) {
  return reinterpret_cast<T>(value);
}

// What the CUDA runtime sees, without torch. "error" says why there is no device.
py::dict device_info() {
  int runtime = 0, driver = 0, num_devices = 0;
  CUDA_CHECK(cudaRuntimeGetVersion(&runtime));
  CUDA_CHECK(cudaDriverGetVersion(&driver));  // 0 where there is no driver
  const cudaError_t code = cudaGetDeviceCount(&num_devices);
  static_cast<void>(cudaGetLastError());  // that there is no device is no error here
  py::dict info;
  info["runtime_version"] = runtime;
  info["driver_version"] = driver == 0 ? py::object(py::none()) : py::int_(driver);
  info["num_devices"] = code == cudaSuccess ? num_devices : 0;
  info["error"] = code == cudaSuccess ? py::object(py::none()) : py::str(cudaGetErrorString(code));
  return info;
}

void stream_read(uintptr_t data, int64_t num_bytes, uintptr_t out, int num_blocks,
                 uintptr_t stream) {
  const tml::StreamReadParams params{handle_of<const void*>(data), handle_of<uint32_t*>(out),
                                     num_bytes, num_blocks};
  tml::launch_stream_read(params, handle_of<cudaStream_t>(stream));
}

tml::GraphLaunch* graph_of(PyObject* capsule) {
  return static_cast<tml::GraphLaunch*>(PyCapsule_GetContext(capsule));
}

py::object graph_launch(uintptr_t graph_exec, uintptr_t stream, int device) {
  auto graph = std::make_unique<tml::GraphLaunch>(handle_of<cudaGraphExec_t>(graph_exec),
                                                  handle_of<cudaStream_t>(stream), device);
  auto* launch = const_cast<tml::TickLaunch*>(&graph->tick_launch());
  const auto capsule = py::reinterpret_steal<py::object>(PyCapsule_New(
      launch, tml::kTickLaunchCapsule, [](PyObject* capsule) { delete graph_of(capsule); }));
  if (!capsule || PyCapsule_SetContext(capsule.ptr(), graph.get()) != 0) {
    throw py::error_already_set();
  }
  graph.release();
  return capsule;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA launchers of tml_kernels: raw pointers, sizes and a stream.";
  m.def("device_info", &device_info);
  m.def("stream_read_num_blocks", &tml::stream_read_num_blocks);
  m.def("stream_read", &stream_read, py::arg("data_ptr"), py::arg("num_bytes"), py::arg("out_ptr"),
        py::arg("num_blocks"), py::arg("stream"));
  m.def("graph_launch", &graph_launch, py::arg("graph_exec"), py::arg("stream"), py::arg("device"));
}
