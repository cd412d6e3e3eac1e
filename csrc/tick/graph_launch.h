// Starts captured CUDA graphs and waits for them, and says when the device worked.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace tml {

// On the clock of now_ns().
struct Launched {
  int64_t launch_ns;  // before the call that launches
  int64_t start_ns;   // the device came to mark_start()
  int64_t end_ns;     // it had done the last of the graph
  int64_t done_ns;    // the waiting thread knew
};

// Of the device that is current when it is made. For one thread.
class GraphLaunch {
 public:
  // In a stream that is capturing, first of all: a node that notes when the graph starts.
  void mark_start(cudaStream_t stream);

  // Nothing is queued in the stream: the device's times are counted from just before the launch.
  Launched run(cudaGraphExec_t graph, cudaStream_t stream);

 private:
  struct Event {
    explicit Event(unsigned flags);
    ~Event();
    Event(const Event&) = delete;
    Event& operator=(const Event&) = delete;
    int64_t ns_since(const Event& earlier) const;

    cudaEvent_t handle;
  };

  Event origin_{cudaEventDefault}, start_{cudaEventDefault};
  Event end_{cudaEventBlockingSync};  // leaves the core to the threads that feed the next tick
};

}  // namespace tml
