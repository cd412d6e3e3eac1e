// Which page holds which tokens of which session: the host's side of the rolling cache. Pure
// bookkeeping, deterministic, for one thread; the caller moves the contents.
//
// A layer group is the layers with one window and head shape; a page id serves all of them.
//
// In a group without a window the pages have a class and never mix them: every class has an open
// page of its own, which its next token goes to. So a page's rows hold ascending positions with
// gaps, where the other classes' tokens are. The page is closed when it is full, or when the next
// token of its class would lie at base + span or beyond; from `base` alone one knows then that a
// page holds nothing but positions of base..base + span. The open page of a class is its newest
// page, while used < page_rows and length - base < span. It is never shared.
//
// In a group with a window the pages are filled whatever the class, so that their positions are
// contiguous, and leave when the window has passed them.
//
// With page_rows = 4 and span = 8, four ticks of 2 audio tokens and 1 of reply make these pages:
//
//   position    0 1 2 3 4 5 6 7 8 9 10 11
//   class       a a r a a r a a r a a  r
//   no window   audio 0 1 3 4   audio 6 7 9 10   reply 2 5 8   reply 11
//   a window    0 1 2 3   4 5 6 7   8 9 10 11
//
// The first reply page has room, but 11 lies at its base + span. A rewind to 8 drops the pages of
// base >= 8 and trims the others to audio 0 1 3 4, audio 6 7 and reply 2 5; the last two are open.
//
// A tick of a session is a transaction: reserve() the worst case, append() what comes, then
// commit() or roll_back(). Whatever throws has changed nothing.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "errors.h"
#include "page_list.h"
#include "page_pool.h"

namespace tml {

constexpr int64_t kMaxTokens = int64_t{1} << 31;    // in one reservation, and of any size
constexpr int64_t kMaxPosition = int64_t{1} << 62;  // sums of positions stay in int64
constexpr PageClass kUnclassed = PageClass::kText;  // of all pages in a group with a window

struct GroupSpec {
  int64_t pages;    // with the zero page
  int64_t columns;  // most pages of one session: the width of its row in the device table
  int64_t page_rows;
  int64_t window;   // 0 is none
  int64_t history;  // positions that a rewind can go back at least, beyond the window
  int64_t span;     // of a page's positions, at least page_rows; 0 with a window
};

struct Session {
  int64_t slot, epoch;

  bool operator==(const Session& other) const { return slot == other.slot && epoch == other.epoch; }
};

using Budgets = std::array<int64_t, kNumClasses>;  // pages per class in each group, no window
using Run = std::pair<PageClass, int64_t>;         // tokens of one class, in their order
using PageCounts = std::array<int64_t, kNumClasses>;

// Copy the first `rows` rows, before anything is written to `to` or `from` is reused.
struct CopyCommand {
  int64_t group, from, to, rows;
};

struct PageRef {
  int64_t group, page, base, used;
  PageClass cls;
};

struct PageImage {
  int64_t group, base, used;
  PageClass cls;
  std::vector<int64_t> positions;  // [used]
};

// A session without its pages' contents, to be kept and made a session again, maybe elsewhere.
struct SessionImage {
  int64_t length, mark, priority;  // mark -1 is none
  Budgets budgets;
  std::vector<int64_t> rolled_to;  // per group: positions below have left its window
  std::vector<PageImage> pages;    // group by group, in the order of suspend() and resume()
};

struct GroupStats {
  int64_t pages, free, waiting, reserved, held, shared;
};

struct SessionStats {
  int64_t length;
  int64_t priority;
  bool in_transaction, suspended;
  std::vector<PageCounts> pages;  // per group
};

class PageTable {
 public:
  static constexpr int kDeltaWords = 4;  // key, page, base, rows

  PageTable(std::vector<GroupSpec> groups, int64_t max_sessions, int64_t lag);

  Session open(const Budgets& budgets, int64_t priority);
  void close(Session session);

  // The tick's runs in their order; returns the pages it holds ready, per group.
  std::vector<int64_t> reserve(Session session, const std::vector<Run>& runs);

  // The position of the first token; rows[g * stride + i] = page * page_rows + row of token i in
  // group g.
  int64_t append(Session session, PageClass cls, int64_t tokens, int64_t* rows, int64_t stride);
  void commit(Session session);
  void roll_back(Session session);

  // The same for many sessions, each as if it were called for one after the other; what is said of
  // one session [R] lies at i * R. reserve_all() stops at the first that reserve() refuses and
  // returns its index, else their number. Where append_all() throws, the sessions before have their
  // tokens: roll them back. positions[column] is that of the token whose row is rows[column].
  int64_t reserve_all(const std::vector<Session>& sessions, const std::vector<PageClass>& classes_R,
                      const int64_t* tokens_S_R);
  void append_all(const std::vector<Session>& sessions, const std::vector<PageClass>& classes_R,
                  const int64_t* tokens_S_R, const int64_t* column_S_R, int64_t* rows,
                  int64_t stride, int64_t* positions);
  void commit_all(const std::vector<Session>& sessions);

  // Frees up to `pages` pages of a group without a window: video, audio, reply, text, each oldest
  // first; never an anchor, a class's open page, or one that is shared. Returns how many.
  int64_t roll(Session session, int64_t group, int64_t pages);
  int64_t evictable(Session session, int64_t group) const;  // the most that roll() would free
  int64_t mark(Session session);
  std::vector<CopyCommand> rewind(Session session, int64_t position);
  std::vector<CopyCommand> rewind_to_mark(Session session);
  std::pair<Session, std::vector<CopyCommand>> fork(Session session, int64_t priority);
  std::vector<PageRef> suspend(Session session);
  std::vector<PageRef> resume(Session session);

  // At rest or suspended. restore() trusts nothing in it and makes a new, suspended session.
  SessionImage image(Session session) const;
  Session restore(const SessionImage& image);

  // Who gives pages for `session`: of those at rest the lowest priority up to its own, then the
  // one that committed last the longest ago. Itself when there is no other.
  Session victim(Session session) const;

  void tick(int64_t n);

  // The device tables lie end to end in flat buffers: entry `index` of a session in group g has the
  // key first_key(g) + slot * columns + index.
  int64_t num_groups() const { return specs_.size(); }
  int64_t num_keys() const { return is_dirty_.size(); }
  int64_t first_key(int64_t group) const;

  // The positions of rows too lie end to end, of the groups without a window, which are
  // num_placed(). Of T tokens whose rows are [groups, T]: where each goes in that buffer, -1 for
  // rows of -1, and its position, T for each such group.
  int64_t num_placed() const;
  void place(const int64_t* rows, const int64_t* positions, int64_t num_tokens,
             int64_t* placed_rows, int64_t* placed_positions) const;

  // What changed in the device tables since the last time, every key once. `rows` is the page's
  // `used`, and with a window page_rows, where causality bounds it; unused entries are (-1, 0, 0).
  int64_t num_deltas() const { return dirty_.size(); }
  void take_deltas(int64_t* out);
  void send_again();  // every entry counts as changed: a device may have missed what was taken

  std::vector<PageRef> pages(Session session, int64_t group) const;  // as the list has them
  std::vector<std::vector<int64_t>> positions(Session session, int64_t group) const;  // likewise
  SessionStats stats(Session session) const;
  std::vector<GroupStats> stats() const;
  int64_t length(Session session) const { return find(session).length; }
  std::vector<int64_t> lengths() const;  // by slot, -1 of a closed one
  // Of these sessions together, by class; and what roll() and commit() took from any since the
  // beginning, per group.
  PageCounts held(const std::vector<Session>& sessions, int64_t group) const;
  const std::vector<PageCounts>& dropped() const { return dropped_; }
  int64_t num_sessions() const { return sessions_.size() - free_slots_.size(); }
  int64_t work() const { return work_; }  // elementary changes since the beginning
  void check_invariants() const;

 private:
  enum class Phase : uint8_t { kClosed, kOpen, kReserved, kSuspended };

  struct Group {
    PageList list;
    std::vector<int32_t> spare;      // reserved and not yet in the list
    int64_t rolled_to = 0;           // positions below have left the window
    std::vector<int64_t> positions;  // of the list's rows, while suspended in no window
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

  const int64_t* row_positions(const State& s, size_t g, int32_t index) const;
  int64_t position(const State& s, size_t g, int32_t index, int32_t row) const;
  int32_t used_below(const State& s, size_t g, int32_t index, int64_t position) const;
  int32_t open_page(const State& s, size_t g, PageClass cls, int64_t position) const;
  std::pair<int64_t, int64_t> worst_case(const State& s, size_t g, const std::vector<Run>&) const;
  void need(size_t g, int64_t pages) const;
  int64_t evictable_in(const State& s, size_t g) const;
  int32_t take(size_t g);
  bool remove(State& s, size_t g, int32_t index);
  void touch(const State& s, size_t g, int32_t index);
  void fill(State& s, size_t g, PageClass cls, int64_t tokens, int64_t* rows);
  void end_transaction(State& s);
  void drop_from(State& s, int64_t position);
  CopyCommand own(State& s, size_t g, int32_t index);
  void check_budgets(const Budgets& budgets) const;
  State state_of(const SessionImage& image) const;
  std::string fault(const State& s, size_t g) const;
  std::string page_fault(const State& s, size_t g, int32_t index) const;
  std::string class_fault(const State& s, size_t g, PageClass cls) const;
  void check_session(const State& s, std::vector<std::vector<int32_t>>& refs) const;

  std::vector<GroupSpec> specs_;
  std::vector<PagePool> pools_;
  std::vector<std::vector<int64_t>> row_positions_;  // [pages * page_rows] per group, no window
  std::vector<State> sessions_;
  std::vector<int64_t> free_slots_;
  std::vector<size_t> first_key_;  // of each group, in is_dirty_
  std::vector<uint8_t> is_dirty_;
  std::vector<std::array<int32_t, 3>> dirty_;  // group, slot, index
  std::vector<PageCounts> dropped_;            // per group
  int64_t tick_ = 0, work_ = 0;
};

// In the order in which roll() takes pages; an anchor is pinned.
constexpr PageClass kEvictionOrder[] = {PageClass::kVideo, PageClass::kAudio, PageClass::kReply,
                                        PageClass::kText};

constexpr PageClass kClasses[] = {PageClass::kAnchor, PageClass::kText, PageClass::kAudio,
                                  PageClass::kVideo, PageClass::kReply};

const char* class_name(PageClass cls);

}  // namespace tml
