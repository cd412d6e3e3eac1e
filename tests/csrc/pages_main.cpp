// The bodies of the kernels that obey the page table, run as plain loops under the sanitizers.
// Every buffer has its exact size, so that an access beyond it is found. Exits with 0, or prints
// what failed.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "kv/apply_deltas.cuh"
#include "kv/move_pages.cuh"

namespace {

std::minstd_rand rng(1);

void expect(bool cond, const char* what) {
  if (cond) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::exit(1);
}

std::vector<int64_t> shuffled(int64_t count) {
  std::vector<int64_t> all(count);
  std::iota(all.begin(), all.end(), 0);
  std::shuffle(all.begin(), all.end(), rng);
  return all;
}

// Distinct places in 0..size - 1, and every third one outside: below zero, or at or past the end.
std::vector<int64_t> places(int64_t count, int64_t size) {
  const std::vector<int64_t> outside = {-1, INT64_MIN, size, size + 1, INT64_MAX};
  std::vector<int64_t> inside = shuffled(size), all;
  for (int64_t i = 0; i < count; ++i) {
    if (i % 3 == 2 || inside.empty()) {
      all.push_back(outside[rng() % outside.size()]);
    } else {
      all.push_back(inside.back());
      inside.pop_back();
    }
  }
  return all;
}

struct Tables {
  std::vector<int32_t> page, rows;
  std::vector<int64_t> base, row_position;

  bool operator==(const Tables& o) const {
    return page == o.page && rows == o.rows && base == o.base && row_position == o.row_position;
  }
};

void apply_deltas(int64_t num_deltas, int64_t num_positions, int64_t num_keys, int64_t num_rows) {
  Tables tables{std::vector<int32_t>(num_keys, -7), std::vector<int32_t>(num_keys, -7),
                std::vector<int64_t>(num_keys, -7), std::vector<int64_t>(num_rows, -7)};
  Tables expected = tables;
  const auto key = places(num_deltas, num_keys), row = places(num_positions, num_rows);
  std::vector<int64_t> delta, position;
  for (int64_t u = 0; u < num_deltas; ++u) {
    const int64_t page = u % 2 == 0 ? -1 : INT32_MAX - u, base = (int64_t{1} << 62) + u;
    for (const int64_t word : {key[u], page, base, u}) delta.push_back(word);
    if (key[u] < 0 || key[u] >= num_keys) continue;
    expected.page[key[u]] = static_cast<int32_t>(page);
    expected.base[key[u]] = base;
    expected.rows[key[u]] = static_cast<int32_t>(u);
  }
  for (int64_t z = 0; z < num_positions; ++z) {
    position.push_back((int64_t{1} << 61) - z);
    if (row[z] >= 0 && row[z] < num_rows) expected.row_position[row[z]] = position[z];
  }

  const tml::ApplyDelta apply{{delta.data(), row.data(), position.data(), tables.page.data(),
                               tables.base.data(), tables.rows.data(), tables.row_position.data(),
                               num_deltas, num_positions, num_keys, num_rows}};
  expect(apply.num_entries() == num_deltas + num_positions, "apply_deltas: entries");
  for (const int64_t i : shuffled(apply.num_entries())) apply(i);
  expect(tables == expected, "apply_deltas: the tables");
}

// `count` bytes that begin `offset` bytes after a multiple of 16 and end with the allocation.
class Bytes {
 public:
  Bytes(int64_t count, int64_t offset)
      : count_(count),
        all_(new (std::align_val_t{16}) uint8_t[count + offset]),
        data_(all_ + offset) {
    for (int64_t i = 0; i < count; ++i) data_[i] = static_cast<uint8_t>(rng());
  }
  ~Bytes() { operator delete[](all_, std::align_val_t{16}); }
  Bytes(const Bytes&) = delete;
  Bytes& operator=(const Bytes&) = delete;

  uint8_t* data() { return data_; }
  std::vector<uint8_t> copy() const { return {data_, data_ + count_}; }

 private:
  int64_t count_;
  uint8_t *all_, *data_;
};

struct MoveCase {
  int64_t num_layers, source_pages, target_pages, num_moves, page_bytes;
  int64_t source_offset, target_offset;  // of the pools, from a multiple of 16
  int vector_bytes;                      // that fit
};

void run(const tml::MovePagesParams& p, int vector_bytes) {
  expect(tml::vector_bytes(p) == vector_bytes, "move_pages: the widest vectors");
  tml::with_move_tile(p, [](auto move) {
    for (const int64_t tile : shuffled(move.num_tiles())) {
      for (int thread = 0; thread < move.kThreads; ++thread) move(tile, thread);
    }
  });
}

void move_pages(const MoveCase& c) {
  Bytes source(c.num_layers * c.source_pages * c.page_bytes, c.source_offset);
  Bytes target(c.num_layers * c.target_pages * c.page_bytes, c.target_offset);
  auto from = places(c.num_moves, c.source_pages);
  const auto to = places(c.num_moves, c.target_pages);
  std::shuffle(from.begin(), from.end(), rng);
  const auto before = source.copy();
  auto expected = target.copy();
  for (int64_t i = 0; i < c.num_moves; ++i) {
    if (from[i] < 0 || from[i] >= c.source_pages || to[i] < 0 || to[i] >= c.target_pages) continue;
    for (int64_t layer = 0; layer < c.num_layers; ++layer) {
      const auto page = before.begin() + (layer * c.source_pages + from[i]) * c.page_bytes;
      std::copy(page, page + c.page_bytes,
                expected.begin() + (layer * c.target_pages + to[i]) * c.page_bytes);
    }
  }
  run({source.data(), target.data(), from.data(), to.data(), c.num_layers, c.source_pages,
       c.target_pages, c.num_moves, c.page_bytes},
      c.vector_bytes);
  expect(target.copy() == expected, "move_pages: the target");
  expect(source.copy() == before, "move_pages: the source is left alone");
}

void move_within_one_pool() {
  constexpr int64_t kLayers = 3, kPages = 7, kBytes = 48;
  Bytes pool(kLayers * kPages * kBytes, 0);
  const auto before = pool.copy();
  const std::vector<int64_t> from = {5, 5, 0, -1}, to = {1, 3, 6, 2};
  run({pool.data(), pool.data(), from.data(), to.data(), kLayers, kPages, kPages, 4, kBytes}, 16);
  const int64_t source_of[kPages] = {0, 5, 2, 5, 4, 5, 0};
  const auto after = pool.copy();
  for (int64_t i = 0; i < kLayers * kPages; ++i) {
    const auto page = before.begin() + (i / kPages * kPages + source_of[i % kPages]) * kBytes;
    expect(std::equal(page, page + kBytes, after.begin() + i * kBytes), "move_pages: in one pool");
  }
}

}  // namespace

int main() {
  for (const int64_t num_deltas : {0, 1, 2, 130}) {
    for (const int64_t num_positions : {0, 1, 129}) {
      for (const int64_t size : {0, 1, 3, 200}) {
        apply_deltas(num_deltas, num_positions, size, size);
        apply_deltas(num_deltas, num_positions, size, 200 - size);
      }
    }
  }
  constexpr int64_t kTile = tml::MoveTile<tml::Bytes16>::kThreads * 4;  // vectors
  for (const MoveCase& c : {
           MoveCase{1, 1, 1, 1, 16, 0, 0, 16},
           MoveCase{2, 5, 4, 6, 48, 0, 16, 16},
           MoveCase{2, 3, 4, 3, kTile * 16 - 16, 0, 0, 16},  // around one tile
           MoveCase{2, 3, 4, 3, kTile * 16, 0, 0, 16},
           MoveCase{2, 3, 4, 3, kTile * 16 + 16, 0, 0, 16},
           MoveCase{2, 3, 4, 3, 2 * kTile * 16 + 8, 0, 0, 8},  // the page's size decides
           MoveCase{2, 3, 4, 3, 4096, 8, 0, 8},                // the source's place does
           MoveCase{2, 3, 4, 3, 4096, 0, 4, 4},                // the target's
           MoveCase{2, 3, 4, 3, 2 * (kTile + 1), 0, 0, 2},
           MoveCase{3, 4, 5, 5, kTile + 1, 0, 0, 1},
           MoveCase{3, 4, 5, 5, 64, 3, 0, 1},
           MoveCase{2, 4, 5, 4, 1, 0, 0, 1},
           MoveCase{2, 0, 5, 4, 32, 0, 0, 16},  // no page to read
           MoveCase{2, 5, 0, 4, 32, 0, 0, 16},  // none to write
           MoveCase{2, 5, 5, 0, 32, 0, 0, 16},  // no moves
           MoveCase{0, 5, 5, 4, 32, 0, 0, 16},  // no layers
       }) {
    move_pages(c);
  }
  move_within_one_pool();
  std::puts("ok");
}
