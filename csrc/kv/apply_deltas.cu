#include "apply_deltas.cuh"
#include "common/launch.h"

namespace tml {
namespace {

constexpr int kThreads = 128;  // small, so that a tick's few hundred entries spread over the chip
constexpr int kBlocksPerSm = 8;

__global__ void __launch_bounds__(kThreads) apply_deltas_kernel(ApplyDelta apply) {
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < apply.num_entries();
       i += stride) {
    apply(i);
  }
}

}  // namespace

void launch_apply_deltas(const ApplyDeltasParams& p, cudaStream_t stream) {
  TML_CHECK(p.num_deltas >= 0 && p.num_positions >= 0, "num_deltas=", p.num_deltas,
            " num_positions=", p.num_positions);
  TML_CHECK(p.num_keys >= 0 && p.num_rows >= 0, "num_keys=", p.num_keys, " num_rows=", p.num_rows);
  TML_CHECK(fits(p.delta, p.num_deltas), "delta: null or misaligned, num_deltas=", p.num_deltas);
  TML_CHECK(fits(p.row, p.num_positions),
            "row: null or misaligned, num_positions=", p.num_positions);
  TML_CHECK(fits(p.position, p.num_positions),
            "position: null or misaligned, num_positions=", p.num_positions);
  TML_CHECK(fits(p.page, p.num_keys), "page: null or misaligned, num_keys=", p.num_keys);
  TML_CHECK(fits(p.base, p.num_keys), "base: null or misaligned, num_keys=", p.num_keys);
  TML_CHECK(fits(p.rows, p.num_keys), "rows: null or misaligned, num_keys=", p.num_keys);
  TML_CHECK(fits(p.row_position, p.num_rows),
            "row_position: null or misaligned, num_rows=", p.num_rows);
  const ApplyDelta apply{p};
  if (apply.num_entries() == 0) return;
  const int64_t blocks = (apply.num_entries() + kThreads - 1) / kThreads;
  apply_deltas_kernel<<<bounded_grid(blocks, kBlocksPerSm), kThreads, 0, stream>>>(apply);
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace tml
