#include "graph_launch.h"

#include "../common/check.h"
#include "clock.h"

namespace tml {

GraphLaunch::Event::Event(unsigned flags) { CUDA_CHECK(cudaEventCreateWithFlags(&handle, flags)); }

GraphLaunch::Event::~Event() {
  // An error here is an earlier launch's, and that launch has reported it.
  static_cast<void>(cudaEventDestroy(handle));
}

int64_t GraphLaunch::Event::ns_since(const Event& earlier) const {
  float ms;
  CUDA_CHECK(cudaEventElapsedTime(&ms, earlier.handle, handle));
  return static_cast<int64_t>(1e6 * ms);
}

void GraphLaunch::mark_start(cudaStream_t stream) {
  CUDA_CHECK(cudaEventRecordWithFlags(start_.handle, stream, cudaEventRecordExternal));
}

Launched GraphLaunch::run(cudaGraphExec_t graph, cudaStream_t stream) {
  TML_CHECK(graph != nullptr, "graph_exec=0; the graph is not instantiated");
  CUDA_CHECK(cudaEventRecord(origin_.handle, stream));
  const int64_t launch_ns = now_ns();
  CUDA_CHECK(cudaGraphLaunch(graph, stream));
  CUDA_CHECK(cudaEventRecord(end_.handle, stream));
  CUDA_CHECK(cudaEventSynchronize(end_.handle));
  const int64_t done_ns = now_ns();
  return {launch_ns, launch_ns + start_.ns_since(origin_), launch_ns + end_.ns_since(origin_),
          done_ns};
}

}  // namespace tml
