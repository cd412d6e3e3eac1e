// Reads memory once and does nearly nothing with it: the bandwidth that a kernel which streams
// weights can hope for on this GPU. (A copy measures something else: it also writes.)
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace tml {

struct StreamReadParams {
  const void* data;   // [num_bytes]   16-byte aligned
  uint32_t* out;      // [num_blocks]  each block's XOR of the 32-bit words it read
  int64_t num_bytes;  // a multiple of 16
  int32_t num_blocks;
};

// Blocks that the current device runs at once: the grid with which no block waits for another.
int stream_read_num_blocks();

// The XOR of all of `out` is that of the data, whatever the grid. Deterministic.
void launch_stream_read(const StreamReadParams& params, cudaStream_t stream);

}  // namespace tml
