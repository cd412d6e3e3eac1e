// Which page holds which tokens of which session: the host's side of the rolling cache. Pure
// bookkeeping, deterministic, for one thread; the caller moves the contents.
//
// A layer group is the layers with one window and head shape; a page id serves all of them. In a
// group without a window the pages have a class and never mix them: where the class of the tokens
// changes, the page is closed with fewer rows used and positions go on in the next. In a group
// with a window the pages are filled whatever the class, and leave when the window has passed them.
//
// With page_rows = 64, 70 text tokens and then 3 of audio make pages of (base, used) = (0, 64),
// (64, 6), (70, 3) without a window, and (0, 64), (64, 9) with one.
//
// A tick of a session is a transaction: reserve() the worst case, append() what comes, then
// commit() or roll_back(). Whatever throws has changed nothing.
#pragma once

#include <array>
#include <cstdint>
#include <utility>
#include <vector>

#include "errors.h"
#include "page_list.h"
#include "page_pool.h"

namespace tml {

constexpr int64_t kMaxTokens = int64_t{1} << 31;  // in one reservation, and of any size

struct GroupSpec {
  int64_t pages;    // with the zero page
  int64_t columns;  // most pages of one session: the width of its row in the device table
  int64_t page_rows;
  int64_t window;   // 0 is none
  int64_t history;  // positions that a rewind can go back at least, beyond the window
};

struct Session {
  int64_t slot, epoch;
};

using Budgets = std::array<int64_t, kNumClasses>;  // pages per class in each group, no window
using Run = std::pair<PageClass, int64_t>;         // tokens of one class, in their order

// Rows row..row + count of the group's pages laid end to end: row / page_rows is the page.
struct Span {
  int64_t group, row, count;
};

struct Appended {
  int64_t position;  // of the first token
  std::vector<Span> spans;
};

// Copy the first `rows` rows, before anything is written to `to` or `from` is reused.
struct CopyCommand {
  int64_t group, from, to, rows;
};

struct PageRef {
  int64_t group, page, base, used;
  PageClass cls;
};

struct GroupStats {
  int64_t pages, free, waiting, reserved, held, shared;
};

struct SessionStats {
  int64_t length;
  int64_t priority;
  bool in_transaction, suspended;
  std::vector<std::array<int64_t, kNumClasses>> pages;  // per group
};

class PageTable {
 public:
  static constexpr int kDeltaWords = 6;  // group, slot, index, page, base, rows

  PageTable(std::vector<GroupSpec> groups, int64_t max_sessions, int64_t lag);

  Session open(const Budgets& budgets, int64_t priority);
  void close(Session session);

  // The tick's runs in their order; returns the pages it holds ready, per group.
  std::vector<int64_t> reserve(Session session, const std::vector<Run>& runs);
  Appended append(Session session, PageClass cls, int64_t tokens);
  void commit(Session session);
  void roll_back(Session session);

  // Frees up to `pages` pages of a group without a window: video, audio, reply, text, each oldest
  // first; never an anchor, the newest page, or one that is shared. Returns how many.
  int64_t roll(Session session, int64_t group, int64_t pages);
  int64_t mark(Session session);
  std::vector<CopyCommand> rewind(Session session, int64_t position);
  std::vector<CopyCommand> rewind_to_mark(Session session);
  std::pair<Session, std::vector<CopyCommand>> fork(Session session, int64_t priority);
  std::vector<PageRef> suspend(Session session);
  std::vector<PageRef> resume(Session session);

  // Who gives pages for `session`: of those at rest the lowest priority up to its own, then the
  // one that committed last the longest ago. Itself when there is no other.
  Session victim(Session session) const;

  void tick(int64_t n);

  // What changed in the device tables since the last time, every entry once.
  int64_t num_deltas() const { return dirty_.size(); }
  void take_deltas(int64_t* out);

  std::vector<PageRef> pages(Session session, int64_t group) const;  // as the list has them
  SessionStats stats(Session session) const;
  std::vector<GroupStats> stats() const;
  int64_t num_sessions() const { return sessions_.size() - free_slots_.size(); }
  int64_t work() const { return work_; }  // elementary changes since the beginning
  void check_invariants() const;

 private:
  enum class Phase : uint8_t { kClosed, kOpen, kReserved, kSuspended };

  struct Group {
    PageList list;
    std::vector<int32_t> spare;  // reserved and not yet in the list
    int64_t rolled_to = 0;       // positions below have left the window
  };

  struct State {
    Phase phase = Phase::kClosed;
    int64_t epoch = 0, priority = 0, length = 0, start = 0, mark = -1, last_tick = 0;
    Budgets budgets{};
    std::vector<Run> runs;
    size_t run = 0;  // the first of `runs` that may still be appended
    std::vector<Group> groups;
  };

  const State& find(Session session) const;
  State& find(Session session, Phase phase, const char* verb);
  int64_t slot_of(const State& s) const { return &s - sessions_.data(); }

  int32_t open_tail(const State& s, size_t g) const;
  std::pair<int64_t, int64_t> worst_case(const State& s, size_t g, const std::vector<Run>&) const;
  void need(size_t g, int64_t pages) const;
  int64_t evictable(const State& s, size_t g) const;
  int32_t take(size_t g);
  bool remove(State& s, size_t g, int32_t index);
  void touch(const State& s, size_t g, int32_t index);
  void fill(State& s, size_t g, PageClass cls, int64_t tokens, std::vector<Span>& spans);
  void end_transaction(State& s);
  void drop_from(State& s, int64_t position);
  int32_t tail_at(const State& s, size_t g, int64_t position) const;
  CopyCommand own(State& s, size_t g, int32_t index);
  void check_session(const State& s, std::vector<std::vector<int32_t>>& refs) const;
  void check_list(const State& s, size_t g) const;

  std::vector<GroupSpec> specs_;
  std::vector<PagePool> pools_;
  std::vector<State> sessions_;
  std::vector<int64_t> free_slots_;
  std::vector<size_t> first_key_;  // of each group, in is_dirty_
  std::vector<uint8_t> is_dirty_;
  std::vector<std::array<int32_t, 3>> dirty_;  // group, slot, index
  int64_t tick_ = 0, work_ = 0;
};

// In the order in which roll() takes pages; an anchor is pinned.
constexpr PageClass kEvictionOrder[] = {PageClass::kVideo, PageClass::kAudio, PageClass::kReply,
                                        PageClass::kText};

const char* class_name(PageClass cls);

}  // namespace tml
