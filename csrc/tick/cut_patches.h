// RGB frames cut into square patches, as the patch tower reads them.
//
// Patches go by row and then by column of the frame, and each holds its part of one frame behind
// its part of the next. A group of two frames of 1 x 4 pixels, a b c d and A B C D, in patches of
// one pixel and five columns: a A | b B | c C | d D | 0 0. What lies beyond a frame is 0.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "common/check.h"

namespace tml {

constexpr int64_t kChannels = 3;  // bytes of a pixel

struct Picture {
  const uint8_t* data;  // [height, width, 3], back to back
  int64_t height, width;
};

struct PatchGrid {
  int64_t rows, columns, side;  // of the frame in patches, and of a patch in pixels

  int64_t patch_bytes() const { return side * side * kChannels; }
  int64_t num_patches() const { return rows * columns; }
};

// One frame's part of patch (0, 0) is at `to`, of the next patch `stride` bytes further. Lines are
// read as they lie in memory, which is where the time goes.
inline void cut_frame(const Picture& frame, const PatchGrid& grid, uint8_t* to, int64_t stride) {
  const int64_t line = grid.side * kChannels;  // of a patch
  for (int64_t y = 0; y < grid.rows * grid.side; ++y) {
    uint8_t* at = to + y / grid.side * grid.columns * stride + y % grid.side * line;
    for (int64_t column = 0; column < grid.columns; ++column, at += stride) {
      const int64_t x = column * grid.side;
      const int64_t inside =
          y < frame.height ? std::clamp((frame.width - x) * kChannels, int64_t{0}, line) : 0;
      if (inside > 0) std::memcpy(at, frame.data + (y * frame.width + x) * kChannels, inside);
      if (inside < line) std::memset(at + inside, 0, line - inside);
    }
  }
}

// Frames of groups, `length` each and one group behind another, to [groups, patches, length, side,
// side, 3].
inline void cut_patches(const std::vector<Picture>& frames, int64_t length, const PatchGrid& grid,
                        uint8_t* to) {
  const int64_t stride = length * grid.patch_bytes();
  for (int64_t n = 0; n < static_cast<int64_t>(frames.size()); ++n) {
    uint8_t* const group = to + n / length * grid.num_patches() * stride;
    cut_frame(frames[n], grid, group + n % length * grid.patch_bytes(), stride);
  }
}

}  // namespace tml
