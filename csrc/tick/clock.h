// CLOCK_MONOTONIC in nanoseconds, and waiting for one of its instants.
#pragma once

#include <time.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <optional>

namespace tml {

// The longest single sleep: a thread that is told to stop notices within this time.
constexpr int64_t kMaxSleepNs = 20'000'000;
constexpr int64_t kNsPerSecond = 1'000'000'000;

inline int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * kNsPerSecond + t.tv_nsec;
}

inline void sleep_until_ns(int64_t wake_ns) {
  timespec t;
  t.tv_sec = wake_ns / kNsPerSecond;
  t.tv_nsec = wake_ns % kNsPerSecond;
  clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, nullptr);
}

inline void spin_pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Sleeps until `deadline_ns - spin_ns`, then spins. Returns the time at which the deadline was seen
// to have passed, never before it; nothing when `stop` was set first.
inline std::optional<int64_t> wait_until_ns(int64_t deadline_ns, int64_t spin_ns,
                                            const std::atomic<bool>& stop) {
  for (;;) {
    if (stop.load(std::memory_order_acquire)) return std::nullopt;
    const int64_t now = now_ns();
    if (now >= deadline_ns) return now;
    const int64_t left = deadline_ns - now - spin_ns;
    if (left > 0) {
      sleep_until_ns(now + std::min(left, kMaxSleepNs));
    } else {
      spin_pause();
    }
  }
}

}  // namespace tml
