// A thread that owns time: it launches tick n at start + (n + 1) * period, on an absolute clock.
//
// It sleeps, then spins for at most `spin_ns`; Schedule decides what runs and what is missed. Every
// tick that ran leaves a record in a bounded ring. On its path there is no lock that another thread
// can hold, no allocation and no Python: only the launch may bring these.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>

#include "launch.h"

namespace tml {

struct TickOptions {
  int64_t period_ns;
  int64_t spin_ns = 500'000;  // 0: sleep only
  int priority = 0;           // 1..99: ask for SCHED_FIFO, or else for a lower nice value
  int64_t max_records = 4096;
};

// One tick that ran. Ticks tick - skipped .. tick - 1 never ran, and are missed too.
struct TickRecord {
  int64_t tick;
  int64_t scheduled_ns;  // start + (tick + 1) * period
  int64_t woke_ns;       // the launch began; >= scheduled_ns
  int64_t done_ns;       // it returned
  int64_t skipped;       // ticks directly before this one that never ran
  bool missed;           // done after scheduled_ns + period, or failed
};

struct TickFailure {
  int64_t tick;
  int code;          // what the launch returned, not 0
  std::string text;  // what it means
};

class TickThread {
 public:
  // `owner` keeps launch.ctx alive until the thread is over.
  TickThread(TickLaunch launch, std::shared_ptr<void> owner, const TickOptions& options);
  ~TickThread();  // stops
  TickThread(const TickThread&) = delete;
  TickThread& operator=(const TickThread&) = delete;

  // Once in a lifetime. Returns when the thread is there and its start time is known.
  void start();

  // From any thread, any number of times: no launch begins after it has returned. From within a
  // launch it only asks, since a thread cannot wait for itself. In a forked child, where the thread
  // does not exist, it has nothing to do.
  void stop();

  // One consumer: the oldest record, if any.
  std::optional<TickRecord> pop_record();

  // Of these all are 0 before start(), and may be read from any thread.
  int64_t start_ns() const;
  int64_t ticks() const;    // all that are over: run or skipped
  int64_t misses() const;   // of these: late, failed or skipped
  int64_t skipped() const;  // of these: never run
  uint64_t records_dropped() const;
  bool running() const;

  // Set once the thread has ended because a launch returned another code than 0.
  std::optional<TickFailure> failure() const;

  // How the thread is scheduled, in words; "not started" before start().
  std::string scheduling() const;

 private:
  struct Loop;  // shared with the thread, which may outlive this object when it destroys it itself
  bool in_child() const;
  bool on_tick_thread() const;

  std::shared_ptr<Loop> loop_;
  std::mutex join_mutex_;
  std::unique_ptr<std::thread> thread_;
  std::atomic<pid_t> pid_{0};  // of the process that started it
};

}  // namespace tml
