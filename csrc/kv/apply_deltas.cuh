// What changed since the last tick, written into the device's page table.
#pragma once

#include <cstdint>

#include "common/device.h"

namespace tml {

struct ApplyDeltasParams {
  const int64_t* delta;                                   // [U, 4]  key, page, base, rows
  const int64_t* row;                                     // [Z]
  const int64_t* position;                                // [Z]
  int32_t* page;                                          // [Q]
  int64_t* base;                                          // [Q]
  int32_t* rows;                                          // [Q]
  int64_t* row_position;                                  // [W]
  int64_t num_deltas, num_positions, num_keys, num_rows;  // U, Z, Q, W
};

// Entry i of the U deltas and then the Z positions. A key or row that is not in its table is
// skipped; they are distinct, so the entries can be applied in any order.
struct ApplyDelta {
  ApplyDeltasParams p;

  TML_HOST_DEVICE int64_t num_entries() const { return p.num_deltas + p.num_positions; }

  TML_HOST_DEVICE void operator()(int64_t i) const {
    if (i < p.num_deltas) {
      const int64_t* delta = p.delta + 4 * i;
      const int64_t key = delta[0];
      if (key < 0 || key >= p.num_keys) return;
      p.page[key] = static_cast<int32_t>(delta[1]);
      p.base[key] = delta[2];
      p.rows[key] = static_cast<int32_t>(delta[3]);
    } else {
      const int64_t row = p.row[i - p.num_deltas];
      if (row < 0 || row >= p.num_rows) return;
      p.row_position[row] = p.position[i - p.num_deltas];
    }
  }
};

void launch_apply_deltas(const ApplyDeltasParams& params, CUstream_st* stream);

}  // namespace tml
