// A thread that owns time: it runs tick n at start + (n + 1) * period, on an absolute clock.
//
// It sleeps, then spins for at most `spin_ns`; Schedule decides what runs and what is missed. Every
// tick that ran leaves a record in a bounded ring. On its path there is no lock that another thread
// can hold, no allocation and no Python: only the step may bring these.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>

namespace tml {

// What a tick thread calls in every tick.
class TickStep {
 public:
  virtual ~TickStep() = default;
  virtual bool run(int64_t tick) = 0;  // false: it failed, which ends the thread
  virtual void leave() = 0;            // on the tick thread, after its last tick
};

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
  int64_t woke_ns;       // the step began; >= scheduled_ns
  int64_t done_ns;       // it returned
  int64_t skipped;       // ticks directly before this one that never ran
  bool missed;           // done after scheduled_ns + period, or failed
};

class TickThread {
 public:
  TickThread(std::shared_ptr<TickStep> step, const TickOptions& options);
  ~TickThread();  // stops
  TickThread(const TickThread&) = delete;
  TickThread& operator=(const TickThread&) = delete;

  // Once in a lifetime. Returns when the thread is there and its start time is known.
  void start();

  // From any thread, any number of times: no step begins after it has returned. From within a
  // step it only asks, since a thread cannot wait for itself. In a forked child, where the thread
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

  // Whether the thread has ended because its step failed.
  bool failed() const;

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
