#include <algorithm>

#include "check.h"
#include "stream_read.cuh"

namespace tml {
namespace {

constexpr int kThreads = 256;
constexpr int kLoads = 8;        // 16-byte loads that each thread has in flight
constexpr int kBlocksPerSm = 4;  // 128 KiB in flight on each multiprocessor
constexpr int kTile = kThreads * kLoads;
constexpr int kWarps = kThreads / 32;

__device__ uint4 load_once(const uint4* ptr) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(ptr));
  return v;
}

__device__ uint32_t fold(uint4 v) { return v.x ^ v.y ^ v.z ^ v.w; }

// Block b reads tiles b, b + num_blocks, ... of kTile vectors; the last may be partial.
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    stream_read_kernel(const uint4* __restrict__ data, uint32_t* __restrict__ out,
                       int64_t num_vectors) {
  uint32_t sum = 0;
  const int64_t stride = int64_t{gridDim.x} * kTile;
  for (int64_t tile = int64_t{blockIdx.x} * kTile; tile < num_vectors; tile += stride) {
    const int64_t first = tile + threadIdx.x;
    if (tile + kTile <= num_vectors) {
      uint4 v[kLoads];
#pragma unroll
      for (int i = 0; i < kLoads; ++i) v[i] = load_once(data + first + i * kThreads);
#pragma unroll
      for (int i = 0; i < kLoads; ++i) sum ^= fold(v[i]);
    } else {
      for (int64_t at = first; at < num_vectors; at += kThreads) sum ^= fold(load_once(data + at));
    }
  }

  __shared__ uint32_t warp_sums[kWarps];
  for (int offset = 16; offset > 0; offset /= 2) sum ^= __shfl_xor_sync(0xffffffffu, sum, offset);
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < kWarps; ++warp) sum ^= warp_sums[warp];
  out[blockIdx.x] = sum;
}

}  // namespace

int stream_read_num_blocks() {
  int device, num_sms, blocks_per_sm;
  CUDA_CHECK(cudaGetDevice(&device));
  CUDA_CHECK(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device));
  CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_per_sm, stream_read_kernel,
                                                           kThreads, 0));
  return num_sms * blocks_per_sm;
}

void launch_stream_read(const StreamReadParams& p, cudaStream_t stream) {
  TML_CHECK(p.num_bytes >= 0 && p.num_bytes % 16 == 0, "num_bytes=", p.num_bytes);
  TML_CHECK(reinterpret_cast<uintptr_t>(p.data) % 16 == 0, "data: misaligned");
  TML_CHECK(p.data != nullptr || p.num_bytes == 0, "num_bytes=", p.num_bytes, " data=null");
  TML_CHECK(p.out != nullptr && reinterpret_cast<uintptr_t>(p.out) % 4 == 0,
            "out: null or misaligned");
  TML_CHECK(p.num_blocks > 0, "num_blocks=", p.num_blocks);
  stream_read_kernel<<<p.num_blocks, kThreads, 0, stream>>>(
      static_cast<const uint4*>(p.data), p.out, p.num_bytes / int64_t{sizeof(uint4)});
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace tml
