// The tick thread's parts under the sanitizers, without Python. Exits with 0, or prints what
// failed.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "tick/audio_windows.h"
#include "tick/clock.h"
#include "tick/cut_patches.h"
#include "tick/ring.h"
#include "tick/schedule.h"
#include "tick/tick_layout.h"
#include "tick/tick_thread.h"

namespace {

constexpr int64_t kMs = 1'000'000;

void expect(bool cond, const char* what) {
  if (cond) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::exit(1);
}

template <typename E, typename F>
void expect_throws(F&& f, const char* what) {
  try {
    f();
  } catch (const E&) {
    return;
  }
  expect(false, what);
}

// Message i has a length and bytes that only i decides.
std::vector<unsigned char> message(uint32_t i, size_t max_size) {
  std::minstd_rand rng(i + 1);
  std::vector<unsigned char> bytes(rng() % (max_size + 1));
  for (auto& byte : bytes) byte = static_cast<unsigned char>(rng());
  return bytes;
}

// The producer repeats what is refused, so all messages arrive; each refusal is counted.
void stress_ring(size_t capacity, uint32_t num_messages) {
  tml::Ring ring(capacity);
  uint64_t refused = 0;
  std::thread producer([&] {
    for (uint32_t i = 0; i < num_messages; ++i) {
      const auto bytes = message(i, ring.max_message());
      while (!ring.push(bytes.data(), bytes.size())) {
        ++refused;
        std::this_thread::yield();
      }
    }
  });
  for (uint32_t i = 0; i < num_messages; ++i) {
    std::optional<size_t> size;
    while (!(size = ring.front_size())) std::this_thread::yield();
    expect(ring.size() <= ring.capacity() / tml::Ring::kHeader, "ring: a possible size");
    std::vector<unsigned char> bytes(*size);
    ring.pop(bytes.data(), bytes.size());
    expect(bytes == message(i, ring.max_message()), "ring: messages arrive whole and in order");
  }
  producer.join();
  expect(!ring.front_size() && ring.size() == 0, "ring: empty at the end");
  expect(ring.dropped() == refused, "ring: every refusal counted");
}

void push_in_parts() {
  tml::Ring ring(16);
  const tml::Ring::Part parts[] = {{"ab", 2}, {nullptr, 0}, {"cde", 3}};
  expect(ring.push(parts, 3) && ring.push("xy", 2) && !ring.push(parts, 3), "parts: fit or not");
  char bytes[5];
  expect(ring.front_size() == 5 && ring.size() == 2, "parts: one message");
  ring.pop(bytes, 5);
  expect(std::string(bytes, 5) == "abcde", "parts: end to end");
}

// Against a line of samples on which nothing is ever closed: sample i of it is there, or 0.
void fuzz_audio_windows() {
  constexpr int64_t kWindows = 3, kSamples = 5, kLine = 400;
  std::minstd_rand rng(5);
  tml::AudioWindows windows(kWindows, kSamples);
  tml::Ring ring(1 << 12);
  std::vector<float> line(kLine, 0.0f), pcm(kSamples);
  std::vector<uint8_t> have(kSamples);
  float next = 1.0f;
  for (int64_t oldest = 0; oldest < kLine / kSamples - kWindows; ++oldest) {
    const int64_t first = oldest * kSamples;
    int64_t late = 0;
    for (int piece = rng() % 6; piece > 0; --piece) {
      const int64_t start = first - 4 + static_cast<int64_t>(rng() % (kWindows * kSamples));
      std::vector<float> samples(rng() % (first + kWindows * kSamples - start + 1));
      for (int64_t i = 0; i < static_cast<int64_t>(samples.size()); ++i) {
        samples[i] = next++;
        if (start + i < first) {
          ++late;
        } else {
          line[start + i] = samples[i];
        }
      }
      const tml::Ring::Part parts[] = {{&start, sizeof(start)},
                                       {samples.data(), samples.size() * sizeof(float)}};
      expect(ring.push(parts, 2), "windows: room in the ring");
    }
    expect(windows.drain(ring, 2) + windows.drain(ring, 100) == late, "windows: what is late");
    const auto end = line.begin() + first + kSamples;
    const auto written = std::count_if(end - kSamples, end, [](float x) { return x != 0; });
    if (rng() % 4 == 0) {
      expect(windows.forget_before(oldest + 1) == written, "windows: what is dropped");
      continue;
    }
    expect(windows.take(pcm.data(), have.data()) == kSamples - written, "windows: what is missing");
    expect(std::equal(pcm.begin(), pcm.end(), end - kSamples), "windows: the samples");
    for (int64_t i = 0; i < kSamples; ++i) expect(have[i] == (pcm[i] != 0), "windows: have");
  }
  const float beyond[2] = {};
  const int64_t end = (windows.forget_before(1000), (1000 + kWindows) * kSamples);
  expect(windows.write(end - 1, beyond, 1) == 0, "windows: the last sample");
  expect_throws<tml::Error>([&] { windows.write(end - 1, beyond, 2); }, "windows: beyond the last");
  expect_throws<tml::Error>([&] { windows.write(INT64_MAX, beyond, 1); }, "windows: far beyond");
  expect(windows.write(INT64_MIN, beyond, 2) == 2, "windows: long ago");
  ring.push("abc", 3);
  expect_throws<tml::Error>([&] { windows.drain(ring, 1); }, "windows: not a piece");
}

void fuzz_schedule() {
  std::minstd_rand rng(7);
  for (int round = 0; round < 200; ++round) {
    const int64_t period = 1 + rng() % 50;
    tml::Schedule schedule(rng() % 1000, period);
    int64_t now = 0, last = -1, misses = 0;
    for (int i = 0; i < 200; ++i) {
      now = std::max(now, schedule.next_wake_ns()) + rng() % (3 * period);
      const auto begun = schedule.begin(now);
      expect(schedule.wake_ns(begun.tick) <= now, "schedule: not early");
      expect(now < schedule.deadline_ns(begun.tick), "schedule: in its own period");
      expect(begun.skipped == begun.tick - last - 1, "schedule: no tick is lost");
      now += rng() % (3 * period);
      const bool missed = schedule.end(now);
      expect(missed == (now > schedule.deadline_ns(begun.tick)), "schedule: late is missed");
      misses += begun.skipped + missed;
      last = begun.tick;
    }
    expect(schedule.ticks() == last + 1 && schedule.misses() == misses, "schedule: counters");
  }
  tml::Schedule far(INT64_MAX - 1, INT64_MAX);
  expect(far.deadline_ns(INT64_MAX) == INT64_MAX, "schedule: times saturate");
  expect_throws<tml::Error>([] { tml::Schedule(0, 0); }, "schedule: a period of 0 is refused");
}

// Ticks that fit and ticks that do not, in arrays of exactly the size: the second change nothing.
void fuzz_layout() {
  using tml::TokenKind;
  constexpr int64_t kTokens = 30, kRows = 4, kSlots = 6, kSteps = 3, kRuns = 4;
  std::vector<int32_t> kind(kTokens), index(kTokens), slot(kRows), start(kRows + 1);
  std::vector<int64_t> at(kRows), last(kRows), length(kSteps * kRows), said(kSlots), steps(kSlots);
  std::vector<int64_t> tokens(kRows * (kRuns + kSteps - 1)), column(tokens.size());
  std::vector<int64_t> position(kTokens + (kSteps - 1) * kRows);
  const auto of = [](auto& v) {
    using T = typename std::remove_reference_t<decltype(v)>::value_type;
    return tml::Numbers<T>{v.data(), static_cast<int64_t>(v.size())};
  };
  tml::TickLayout layout(
      {TokenKind::kText, TokenKind::kEmbedded, TokenKind::kLevels, TokenKind::kStep},
      {of(kind), of(index), of(slot), of(start), of(at), of(last), of(length), of(said), of(steps),
       of(tokens), of(column), of(position)});
  std::minstd_rand rng(3);
  for (int round = 0; round < 2000; ++round) {
    std::vector<int64_t> slots(rng() % (kRows + 2)), counts;
    for (auto& s : slots) s = static_cast<int64_t>(rng() % (kSlots + 1));
    size_t text = 0;
    int64_t total = 0;
    for (size_t row = 0; row < slots.size(); ++row) {
      for (int64_t run = 0; run < kRuns; ++run) {
        counts.push_back(run + 1 < kRuns ? static_cast<int64_t>(rng() % 5) : kSteps);
        total += run + 1 < kRuns ? counts.back() : 1;
        if (run == 0) text += counts.back();
      }
    }
    const bool fits = slots.size() <= kRows && total <= kTokens &&
                      std::count(slots.begin(), slots.end(), kSlots) == 0;
    const std::vector<int32_t> ids(text, 9), before = kind;
    const tml::Numbers<const int64_t> given{counts.data(), static_cast<int64_t>(counts.size())};
    if (!fits) {
      expect_throws<tml::Error>([&] { layout.fill(slots, given, ids); }, "layout: no room");
      expect(kind == before, "layout: nothing changed");
      continue;
    }
    layout.fill(slots, given, ids);
    layout.set_lengths();
    expect(start.back() == total, "layout: all tokens");
    expect(std::count(kind.begin(), kind.end(), 0) == kTokens - total,
           "layout: the rest is nothing");
  }
}

// Frames and patches of any size, in arrays of exactly theirs.
void fuzz_patches() {
  std::minstd_rand rng(4);
  const auto size = [&rng](int64_t most) { return 1 + static_cast<int64_t>(rng() % most); };
  for (int round = 0; round < 500; ++round) {
    const tml::PatchGrid grid{size(3), size(3), size(5)};
    const int64_t length = size(2), num_groups = size(2), height = size(16), width = size(16);
    std::vector<std::vector<uint8_t>> pixels(num_groups * length);
    std::vector<tml::Picture> frames;
    for (auto& frame : pixels) {
      frame.resize(height * width * tml::kChannels);
      for (auto& value : frame) value = static_cast<uint8_t>(rng());
      frames.push_back({frame.data(), height, width});
    }
    std::vector<uint8_t> out(num_groups * grid.num_patches() * length * grid.patch_bytes(), 77);
    tml::cut_patches(frames, length, grid, out.data());
    for (size_t i = 0; i < out.size(); ++i) {
      int64_t rest = static_cast<int64_t>(i);
      const auto next = [&rest](int64_t base) {
        const int64_t digit = rest % base;
        rest /= base;
        return digit;
      };
      const int64_t channel = next(tml::kChannels), x = next(grid.side), y = next(grid.side);
      const int64_t n = next(length), column = next(grid.columns), row = next(grid.rows);
      const int64_t at_y = row * grid.side + y, at_x = column * grid.side + x;
      const bool inside = at_y < height && at_x < width;
      const size_t at = (at_y * width + at_x) * tml::kChannels + channel;
      expect(out[i] == (inside ? pixels[rest * length + n][at] : 0), "patches: every pixel");
    }
  }
}

struct Step : tml::TickStep {
  std::atomic<int64_t> runs{0}, leaves{0};
  int64_t fail_at = INT64_MAX;  // the tick from which on it fails

  bool run(int64_t tick) override {
    ++runs;
    return tick < fail_at;
  }
  void leave() override { ++leaves; }
};

tml::TickOptions every(int64_t period_ns) {
  tml::TickOptions options{};
  options.period_ns = period_ns;
  options.spin_ns = period_ns / 4;
  options.max_records = 1024;
  return options;
}

// Starts, drains while it runs, and stops from several threads at once.
void run_thread() {
  const auto step = std::make_shared<Step>();
  tml::TickThread thread(step, every(kMs));
  thread.start();
  int64_t next = 0, missed = 0, drained = 0;
  const auto drain = [&] {
    while (const auto r = thread.pop_record()) {
      expect(r->tick - r->skipped == next, "thread: every tick number once");
      expect(r->scheduled_ns == thread.start_ns() + (r->tick + 1) * kMs, "thread: exact times");
      expect(r->woke_ns >= r->scheduled_ns && r->done_ns >= r->woke_ns, "thread: never early");
      next = r->tick + 1;
      missed += r->skipped + r->missed;
      ++drained;
    }
  };
  while (thread.ticks() < 100) {
    drain();
    expect(thread.running() && !thread.failed(), "thread: runs");
    tml::sleep_until_ns(tml::now_ns() + kMs);
  }
  std::vector<std::thread> stoppers;
  for (int i = 0; i < 4; ++i) stoppers.emplace_back([&] { thread.stop(); });
  for (auto& stopper : stoppers) stopper.join();
  drain();
  expect(!thread.running() && !thread.failed() && step->leaves == 1, "thread: left once");
  expect(next == thread.ticks() && missed == thread.misses(), "thread: records equal counters");
  expect(drained == step->runs && thread.records_dropped() == 0, "thread: a record per run");
  expect_throws<tml::StateError>([&] { thread.start(); }, "thread: restart is refused");
}

void fail_thread() {
  const auto step = std::make_shared<Step>();
  step->fail_at = 2;
  tml::TickThread thread(step, every(kMs));
  thread.start();
  while (thread.running()) std::this_thread::yield();
  expect(thread.failed() && thread.ticks() > 2 && thread.misses() > 0, "failure: told, and missed");
  thread.stop();
  expect(step->runs >= 1 && step->leaves == 1, "failure: left once");
}

// The step destroys the object that its own thread belongs to.
struct Suicide : tml::TickStep {
  std::unique_ptr<tml::TickThread> thread;
  std::atomic<bool> started{false};

  bool run(int64_t) override {
    while (!started) std::this_thread::yield();
    thread.reset();
    return true;
  }
  void leave() override {}
};

void destroy_in_step() {
  auto suicide = std::make_shared<Suicide>();
  const std::weak_ptr<Suicide> gone = suicide;
  suicide->thread = std::make_unique<tml::TickThread>(suicide, every(kMs));
  suicide->thread->start();
  suicide->started = true;
  suicide.reset();
  while (!gone.expired()) std::this_thread::yield();
}

}  // namespace

int main() {
  stress_ring(16, 20'000);
  stress_ring(64, 20'000);
  stress_ring(4096, 1000);
  push_in_parts();
  fuzz_audio_windows();
  fuzz_schedule();
  fuzz_layout();
  fuzz_patches();
  run_thread();
  fail_thread();
  for (int i = 0; i < 20; ++i) destroy_in_step();
  std::puts("ok");
}
