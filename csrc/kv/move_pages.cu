#include "common/launch.h"
#include "move_pages.cuh"

namespace tml {
namespace {

constexpr int kBlocksPerSm = 8;  // all threads that a multiprocessor holds

template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, kBlocksPerSm) move_pages_kernel(Tile move) {
  for (int64_t tile = blockIdx.x; tile < move.num_tiles(); tile += gridDim.x) {
    move(tile, threadIdx.x);
  }
}

}  // namespace

void launch_move_pages(const MovePagesParams& p, cudaStream_t stream) {
  TML_CHECK(p.num_layers >= 0 && p.num_moves >= 0, "num_layers=", p.num_layers,
            " num_moves=", p.num_moves);
  TML_CHECK(p.source_pages >= 0 && p.target_pages >= 0, "source_pages=", p.source_pages,
            " target_pages=", p.target_pages);
  TML_CHECK(p.page_bytes >= 0, "page_bytes=", p.page_bytes);
  TML_CHECK(fits(p.from, p.num_moves), "from: null or misaligned, num_moves=", p.num_moves);
  TML_CHECK(fits(p.to, p.num_moves), "to: null or misaligned, num_moves=", p.num_moves);
  const int64_t source_bytes = p.num_layers * p.source_pages * p.page_bytes;
  const int64_t target_bytes = p.num_layers * p.target_pages * p.page_bytes;
  TML_CHECK(p.source != nullptr || source_bytes == 0, "source=null source_bytes=", source_bytes);
  TML_CHECK(p.target != nullptr || target_bytes == 0, "target=null target_bytes=", target_bytes);
  if (p.num_moves == 0 || source_bytes == 0 || target_bytes == 0) return;
  with_move_tile(p, [&](auto move) {
    using Tile = decltype(move);
    const unsigned blocks = bounded_grid(move.num_tiles(), kBlocksPerSm);
    move_pages_kernel<<<blocks, Tile::kThreads, 0, stream>>>(move);
  });
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace tml
