// What the launchers of kernels check and choose.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>

#include "check.h"

namespace tml {

// Aligned for T, and not null where there is something to read or write.
template <typename T>
bool fits(const T* ptr, int64_t count, size_t alignment = alignof(T)) {
  return reinterpret_cast<uintptr_t>(ptr) % alignment == 0 && (ptr != nullptr || count == 0);
}

// A block for each of `work`, but no more than the current device runs at once: kernels loop.
inline unsigned bounded_grid(int64_t work, int blocks_per_sm) {
  int device, num_sms;
  CUDA_CHECK(cudaGetDevice(&device));
  CUDA_CHECK(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device));
  return static_cast<unsigned>(std::min<int64_t>(work, int64_t{num_sms} * blocks_per_sm));
}

}  // namespace tml
