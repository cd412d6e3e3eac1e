// What a tick thread calls in every tick: plain C, so that a Python step and a function without
// Python look alike. Across extension modules it travels in a capsule of this name.
#pragma once

#include <cstdint>

namespace tml {

constexpr const char* kTickLaunchCapsule = "tml.tick_launch";

struct TickLaunch {
  int (*launch)(void* ctx, int64_t tick);        // 0, or a code that stops the thread
  const char* (*describe)(void* ctx, int code);  // text for a code; may be null
  void (*finish)(void* ctx);  // on the tick thread, after its last launch; may be null
  void* ctx;
};

}  // namespace tml
