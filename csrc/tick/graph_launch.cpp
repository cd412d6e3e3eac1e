#include "graph_launch.h"

#include "../common/check.h"

namespace tml {

GraphLaunch::GraphLaunch(cudaGraphExec_t graph, cudaStream_t stream, int device)
    : graph_(graph),
      stream_(stream),
      device_(device),
      tick_launch_{&launch, &describe, nullptr, this} {
  TML_CHECK(graph != nullptr, "graph_exec=0; the graph is not instantiated");
  int num_devices = 0;
  CUDA_CHECK(cudaGetDeviceCount(&num_devices));
  TML_CHECK(device >= 0 && device < num_devices, "device=", device, " num_devices=", num_devices);
  int previous;
  CUDA_CHECK(cudaGetDevice(&previous));
  CUDA_CHECK(cudaSetDevice(device));
  // A blocking wait leaves the core to the threads that feed the next tick.
  const cudaError_t code =
      cudaEventCreateWithFlags(&done_, cudaEventDisableTiming | cudaEventBlockingSync);
  CUDA_CHECK(cudaSetDevice(previous));
  CUDA_CHECK(code);
}

GraphLaunch::~GraphLaunch() {
  // An error here is an earlier launch's, and that launch has reported it.
  if (done_ != nullptr) static_cast<void>(cudaEventDestroy(done_));
}

int GraphLaunch::launch(void* ctx, int64_t /*tick*/) {
  const auto& self = *static_cast<GraphLaunch*>(ctx);
  cudaError_t code = cudaSetDevice(self.device_);  // the device is a property of the thread
  if (code == cudaSuccess) code = cudaGraphLaunch(self.graph_, self.stream_);
  if (code == cudaSuccess) code = cudaEventRecord(self.done_, self.stream_);
  if (code == cudaSuccess) code = cudaEventSynchronize(self.done_);
  return code;
}

const char* GraphLaunch::describe(void* /*ctx*/, int code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}

}  // namespace tml
