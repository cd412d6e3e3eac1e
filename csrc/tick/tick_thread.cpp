#include "tick_thread.h"

#include <pthread.h>
#include <sched.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <future>
#include <utility>

#include "clock.h"
#include "ring.h"
#include "schedule.h"

namespace tml {
namespace {

constexpr int kNice = -10;
constexpr int64_t kMaxRecords = 1 << 20;

// Asks for a real-time policy, then for a lower nice value; what was granted, in words.
std::string set_priority(int priority) {
  if (priority == 0) return "default";
  sched_param param{};
  param.sched_priority = priority;
  const int code = pthread_setschedparam(pthread_self(), SCHED_FIFO, &param);
  if (code == 0) return concat("SCHED_FIFO ", priority);
  const std::string refusal = concat("SCHED_FIFO refused: ", std::strerror(code));
  const auto thread_id = static_cast<id_t>(syscall(SYS_gettid));
  if (setpriority(PRIO_PROCESS, thread_id, kNice) == 0)
    return concat("nice ", kNice, "; ", refusal);
  return concat("default; ", refusal, "; nice refused: ", std::strerror(errno));
}

}  // namespace

struct TickThread::Loop {
  Loop(std::shared_ptr<TickStep> step, const TickOptions& options)
      : step(std::move(step)),
        options(options),
        records(static_cast<size_t>(options.max_records) * (sizeof(TickRecord) + Ring::kHeader)) {}

  void run(std::promise<void> started);
  void run_ticks(Schedule& schedule);
  void publish(const Schedule& schedule);

  const std::shared_ptr<TickStep> step;
  const TickOptions options;
  Ring records;

  std::atomic<bool> stop{false}, running{false}, failed{false};
  std::atomic<int64_t> start_ns{0}, ticks{0}, misses{0}, skipped{0};
  std::atomic<std::thread::id> thread_id{};
  std::string scheduling = "not started";  // written before `started`
};

void TickThread::Loop::run(std::promise<void> started) {
  pthread_setname_np(pthread_self(), "tml-tick");
  prctl(PR_SET_TIMERSLACK, 1UL);  // 1 ns in place of the default 50 us
  thread_id = std::this_thread::get_id();
  scheduling = set_priority(options.priority);
  Schedule schedule(now_ns(), options.period_ns);
  start_ns = schedule.start_ns();
  running = true;
  started.set_value();
  run_ticks(schedule);
  step->leave();
  running = false;
}

void TickThread::Loop::run_ticks(Schedule& schedule) {
  while (const auto woke = wait_until_ns(schedule.next_wake_ns(), options.spin_ns, stop)) {
    const auto [tick, skipped_before] = schedule.begin(*woke);
    const bool succeeded = step->run(tick);
    const int64_t done = now_ns();
    const bool missed = schedule.end(done, !succeeded);
    const TickRecord record{tick, schedule.wake_ns(tick), *woke, done, skipped_before, missed};
    records.push(&record, sizeof record);
    publish(schedule);
    if (succeeded) continue;
    failed = true;
    return;
  }
}

void TickThread::Loop::publish(const Schedule& schedule) {
  skipped.store(schedule.skipped(), std::memory_order_relaxed);
  misses.store(schedule.misses(), std::memory_order_relaxed);
  ticks.store(schedule.ticks(), std::memory_order_release);
}

TickThread::TickThread(std::shared_ptr<TickStep> step, const TickOptions& options) {
  TML_CHECK(options.period_ns > 0, "period_ns=", options.period_ns);
  TML_CHECK(options.spin_ns >= 0, "spin_ns=", options.spin_ns);
  TML_CHECK(options.priority >= 0 && options.priority <= 99, "priority=", options.priority);
  TML_CHECK(options.max_records > 0 && options.max_records <= kMaxRecords,
            "max_records=", options.max_records);
  loop_ = std::make_shared<Loop>(std::move(step), options);
}

TickThread::~TickThread() {
  stop();
  if (thread_ == nullptr) return;
  if (in_child()) {
    thread_.release();  // there is no thread to join or detach
  } else {
    thread_->detach();  // this is it: it holds the loop, and ends after the step it is in
  }
}

void TickThread::start() {
  const std::lock_guard<std::mutex> lock(join_mutex_);
  if (pid_ != 0 || loop_->stop) throw StateError("start: a tick thread runs once; make a new one");
  pid_ = getpid();
  std::promise<void> started;
  const std::future<void> is_started = started.get_future();
  thread_ = std::make_unique<std::thread>(
      [loop = loop_, started = std::move(started)]() mutable { loop->run(std::move(started)); });
  is_started.wait();
}

void TickThread::stop() {
  loop_->stop = true;
  if (in_child() || on_tick_thread()) return;
  const std::lock_guard<std::mutex> lock(join_mutex_);
  if (thread_ == nullptr) return;
  thread_->join();
  thread_.reset();
  loop_->thread_id = std::thread::id{};  // the system may give it to another thread now
}

bool TickThread::in_child() const { return pid_ != 0 && pid_ != getpid(); }

bool TickThread::on_tick_thread() const {
  return loop_->thread_id.load() == std::this_thread::get_id();
}

std::optional<TickRecord> TickThread::pop_record() {
  const auto size = loop_->records.front_size();
  if (!size) return std::nullopt;
  TickRecord record;
  loop_->records.pop(&record, sizeof record);
  return record;
}

int64_t TickThread::start_ns() const { return loop_->start_ns; }
int64_t TickThread::ticks() const { return loop_->ticks.load(std::memory_order_acquire); }
int64_t TickThread::misses() const { return loop_->misses.load(std::memory_order_relaxed); }
int64_t TickThread::skipped() const { return loop_->skipped.load(std::memory_order_relaxed); }
uint64_t TickThread::records_dropped() const { return loop_->records.dropped(); }
bool TickThread::running() const { return loop_->running && !in_child(); }

bool TickThread::failed() const { return loop_->failed; }

std::string TickThread::scheduling() const {
  return loop_->start_ns == 0 ? "not started" : loop_->scheduling;
}

}  // namespace tml
