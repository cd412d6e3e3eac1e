// Pages of all layers from one pool to another, or to other places of the same one.
#pragma once

#include <cstdint>

#include "common/device.h"

namespace tml {

struct MovePagesParams {
  const void* source;    // [L, P, page_bytes]
  void* target;          // [L, N, page_bytes]
  const int64_t* from;   // [I]
  const int64_t* to;     // [I]
  int64_t num_layers;    // L
  int64_t source_pages;  // P
  int64_t target_pages;  // N
  int64_t num_moves;     // I
  int64_t page_bytes;
};

struct alignas(16) Bytes16 {
  uint64_t low, high;
};

// A page is cut into tiles of kThreads * kLoads vectors, the last one partial; tile t belongs to
// move t / tiles_per_page % I of layer t / tiles_per_page / I. A page that is not in its pool is
// skipped. No page is written that is read, so the tiles can be moved in any order.
template <typename Vector>
struct MoveTile {
  static constexpr int kThreads = 256;
  static constexpr int kLoads = 4;  // of a thread, in flight together

  MovePagesParams p;
  int64_t page_vectors, tiles_per_page;

  explicit MoveTile(const MovePagesParams& params)
      : p(params),
        page_vectors(params.page_bytes / int64_t{sizeof(Vector)}),
        tiles_per_page((page_vectors + kThreads * kLoads - 1) / (kThreads * kLoads)) {}

  TML_HOST_DEVICE int64_t num_tiles() const { return p.num_layers * p.num_moves * tiles_per_page; }

  TML_HOST_DEVICE void operator()(int64_t tile, int thread) const {
    const int64_t page = tile / tiles_per_page;
    const int64_t layer = page / p.num_moves;
    const int64_t from = p.from[page % p.num_moves], to = p.to[page % p.num_moves];
    if (from < 0 || from >= p.source_pages || to < 0 || to >= p.target_pages) return;
    const int64_t first = tile % tiles_per_page * (kThreads * kLoads) + thread;
    const auto* source = static_cast<const Vector*>(p.source) +
                         (layer * p.source_pages + from) * page_vectors + first;
    auto* target =
        static_cast<Vector*>(p.target) + (layer * p.target_pages + to) * page_vectors + first;
    const int64_t left = page_vectors - first;  // from this thread's first vector on

    Vector v[kLoads];
    for (int i = 0; i < kLoads; ++i) {
      if (i * kThreads < left) v[i] = source[i * kThreads];
    }
    for (int i = 0; i < kLoads; ++i) {
      if (i * kThreads < left) target[i * kThreads] = v[i];
    }
  }
};

// The widest vectors, of 16, 8, 4, 2 or 1 bytes, that both pools and all their pages begin and end
// with.
inline int vector_bytes(const MovePagesParams& p) {
  const uintptr_t all = reinterpret_cast<uintptr_t>(p.source) |
                        reinterpret_cast<uintptr_t>(p.target) |
                        static_cast<uintptr_t>(p.page_bytes) | 16;
  return static_cast<int>(all & -all);
}

// f(MoveTile) with the widest vectors.
template <typename F>
void with_move_tile(const MovePagesParams& p, F&& f) {
  switch (vector_bytes(p)) {
    case 16:
      return f(MoveTile<Bytes16>(p));
    case 8:
      return f(MoveTile<uint64_t>(p));
    case 4:
      return f(MoveTile<uint32_t>(p));
    case 2:
      return f(MoveTile<uint16_t>(p));
    default:
      return f(MoveTile<uint8_t>(p));
  }
}

// Source or target may be pinned memory of the host.
void launch_move_pages(const MovePagesParams& params, CUstream_st* stream);

}  // namespace tml
