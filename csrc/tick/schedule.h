// When ticks run, and which of them are late: pure logic over absolute times, without a clock.
//
// Tick n covers media time [n * period, (n + 1) * period), so it can run at start + (n + 1) *
// period at the earliest; it misses when it is not done by start + (n + 2) * period. A tick whose
// time has wholly passed before it could begin is skipped: counted as a miss, never replayed. So at
// most one tick begins in any period, and lateness never accumulates.
//
// With start = 0 and period = 200: tick 0 begins at 200 and is done at 710. It missed (deadline
// 400), tick 1 (deadline 600) is skipped, and tick 2 (wake 600, deadline 800) begins at once.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "../common/check.h"

namespace tml {

class Schedule {
 public:
  struct Begun {
    int64_t tick;     // the tick to run now
    int64_t skipped;  // ticks directly before it whose time has wholly passed
  };

  Schedule(int64_t start_ns, int64_t period_ns) : start_(start_ns), period_(period_ns) {
    TML_CHECK(start_ns >= 0, "start_ns=", start_ns);
    TML_CHECK(period_ns > 0, "period_ns=", period_ns);
  }

  // Times are exact up to the end of int64 (292 years), where they stay.
  int64_t wake_ns(int64_t tick) const { return edge_ns(tick, 1); }
  int64_t deadline_ns(int64_t tick) const { return edge_ns(tick, 2); }
  int64_t next_wake_ns() const { return wake_ns(next_); }

  // Chooses the tick to run at `now_ns`, which is not before next_wake_ns().
  Begun begin(int64_t now_ns) {
    if (open_) throw StateError(concat("begin: tick ", next_ - 1, " has not ended"));
    TML_CHECK(now_ns >= 0, "now_ns=", now_ns);
    const int64_t current = (now_ns - start_) / period_ - 1;
    TML_CHECK(current >= next_, "now_ns=", now_ns, " next_wake_ns=", next_wake_ns());
    const int64_t skipped = current - next_;
    skipped_ += skipped;
    misses_ += skipped;
    ticks_ += skipped;
    next_ = current + 1;
    open_ = true;
    return {current, skipped};
  }

  // Ends the tick that began last. A tick that failed is missed whatever the time; returns whether
  // it was.
  bool end(int64_t now_ns, bool failed = false) {
    if (!open_) throw StateError("end: no tick has begun");
    const bool missed = failed || now_ns > deadline_ns(next_ - 1);
    misses_ += missed;
    ticks_ += 1;
    open_ = false;
    return missed;
  }

  int64_t start_ns() const { return start_; }
  int64_t period_ns() const { return period_; }
  int64_t next_tick() const { return next_; }
  int64_t ticks() const { return ticks_; }      // all that are over: run or skipped
  int64_t misses() const { return misses_; }    // of these: late, failed or skipped
  int64_t skipped() const { return skipped_; }  // of these: never run

 private:
  int64_t edge_ns(int64_t tick, int64_t after) const {
    TML_CHECK(tick >= 0, "tick=", tick);
    int64_t edge;
    if (__builtin_add_overflow(tick, after, &edge) ||
        __builtin_mul_overflow(edge, period_, &edge) ||
        __builtin_add_overflow(edge, start_, &edge)) {
      return std::numeric_limits<int64_t>::max();
    }
    return edge;
  }

  int64_t start_, period_;
  int64_t next_ = 0;  // first tick that has not begun
  int64_t ticks_ = 0, misses_ = 0, skipped_ = 0;
  bool open_ = false;
};

}  // namespace tml
