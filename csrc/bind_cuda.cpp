// tml_kernels._cuda: built when nvcc is found. Takes raw pointers and handles; knows no torch.
#include <pybind11/pybind11.h>

#include "common/check.h"
#include "common/stream_read.cuh"
#include "kv/apply_deltas.cuh"
#include "kv/move_pages.cuh"
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

void apply_deltas(uintptr_t delta, int64_t num_deltas, uintptr_t row, uintptr_t position,
                  int64_t num_positions, uintptr_t page, uintptr_t base, uintptr_t rows,
                  int64_t num_keys, uintptr_t row_position, int64_t num_rows, uintptr_t stream) {
  const tml::ApplyDeltasParams params{handle_of<const int64_t*>(delta),
                                      handle_of<const int64_t*>(row),
                                      handle_of<const int64_t*>(position),
                                      handle_of<int32_t*>(page),
                                      handle_of<int64_t*>(base),
                                      handle_of<int32_t*>(rows),
                                      handle_of<int64_t*>(row_position),
                                      num_deltas,
                                      num_positions,
                                      num_keys,
                                      num_rows};
  tml::launch_apply_deltas(params, handle_of<cudaStream_t>(stream));
}

void move_pages(uintptr_t source, int64_t source_pages, uintptr_t target, int64_t target_pages,
                uintptr_t from, uintptr_t to, int64_t num_moves, int64_t num_layers,
                int64_t page_bytes, uintptr_t stream) {
  const tml::MovePagesParams params{handle_of<const void*>(source),
                                    handle_of<void*>(target),
                                    handle_of<const int64_t*>(from),
                                    handle_of<const int64_t*>(to),
                                    num_layers,
                                    source_pages,
                                    target_pages,
                                    num_moves,
                                    page_bytes};
  tml::launch_move_pages(params, handle_of<cudaStream_t>(stream));
}

py::tuple run_graph(tml::GraphLaunch& launch, uintptr_t graph_exec, uintptr_t stream) {
  tml::Launched times;
  {
    const py::gil_scoped_release no_gil;
    times = launch.run(handle_of<cudaGraphExec_t>(graph_exec), handle_of<cudaStream_t>(stream));
  }
  return py::make_tuple(times.launch_ns, times.start_ns, times.end_ns, times.done_ns);
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA launchers of tml_kernels: raw pointers, sizes and a stream.";
  m.def("device_info", &device_info);
  m.def("stream_read_num_blocks", &tml::stream_read_num_blocks);
  m.def("stream_read", &stream_read, py::arg("data_ptr"), py::arg("num_bytes"), py::arg("out_ptr"),
        py::arg("num_blocks"), py::arg("stream"));
  m.def("apply_deltas", &apply_deltas, py::arg("delta_ptr"), py::arg("num_deltas"),
        py::arg("row_ptr"), py::arg("position_ptr"), py::arg("num_positions"), py::arg("page_ptr"),
        py::arg("base_ptr"), py::arg("rows_ptr"), py::arg("num_keys"), py::arg("row_position_ptr"),
        py::arg("num_rows"), py::arg("stream"));
  m.def("move_pages", &move_pages, py::arg("source_ptr"), py::arg("source_pages"),
        py::arg("target_ptr"), py::arg("target_pages"), py::arg("from_ptr"), py::arg("to_ptr"),
        py::arg("num_moves"), py::arg("num_layers"), py::arg("page_bytes"), py::arg("stream"));
  py::class_<tml::GraphLaunch>(m, "GraphLaunch")
      .def(py::init<>())
      .def(
          "mark_start",
          [](tml::GraphLaunch& launch, uintptr_t stream) {
            launch.mark_start(handle_of<cudaStream_t>(stream));
          },
          py::arg("stream"))
      .def("run", &run_graph, py::arg("graph_exec"), py::arg("stream"));
}
