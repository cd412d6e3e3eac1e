// A captured CUDA graph as a tick's launch: start it, then sleep until the GPU is done.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "launch.h"

namespace tml {

class GraphLaunch {
 public:
  // The graph must outlive this and be instantiated on `device`, as `stream` must be created there.
  GraphLaunch(cudaGraphExec_t graph, cudaStream_t stream, int device);
  ~GraphLaunch();
  GraphLaunch(const GraphLaunch&) = delete;
  GraphLaunch& operator=(const GraphLaunch&) = delete;

  // Valid as long as this object.
  const TickLaunch& tick_launch() const { return tick_launch_; }

 private:
  static int launch(void* ctx, int64_t tick);
  static const char* describe(void* ctx, int code);

  cudaGraphExec_t graph_;
  cudaStream_t stream_;
  int device_;
  cudaEvent_t done_ = nullptr;
  TickLaunch tick_launch_;
};

}  // namespace tml
