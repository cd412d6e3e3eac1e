#include "page_table.h"

#include <algorithm>
#include <limits>

namespace tml {

const char* class_name(PageClass cls) {
  constexpr const char* kNames[] = {"anchor", "text", "audio", "video", "reply"};
  return kNames[static_cast<int>(cls)];
}

PageTable::PageTable(std::vector<GroupSpec> groups, int64_t max_sessions, int64_t lag)
    : specs_(std::move(groups)) {
  TML_CHECK(!specs_.empty(), "groups=0");
  TML_CHECK(max_sessions > 0, "max_sessions=", max_sessions);
  TML_CHECK(lag >= 0, "lag=", lag);
  State state;
  size_t num_keys = 0;
  for (GroupSpec& spec : specs_) {
    TML_CHECK(spec.pages > 1 && spec.pages < kMaxTokens, "pages=", spec.pages);
    TML_CHECK(spec.columns > 0 && spec.columns < kMaxTokens, "columns=", spec.columns);
    TML_CHECK(spec.page_rows > 0 && spec.page_rows < kMaxTokens, "page_rows=", spec.page_rows);
    TML_CHECK(spec.window >= 0 && spec.window < kMaxTokens, "window=", spec.window);
    TML_CHECK(spec.history >= 0 && spec.history < kMaxTokens, "history=", spec.history);
    TML_CHECK(spec.history == 0 || spec.window > 0, "history=", spec.history, " window=0");
    TML_CHECK(spec.window == 0 || spec.span == 0, "span=", spec.span, " window=", spec.window);
    TML_CHECK(spec.window > 0 || (spec.span >= spec.page_rows && spec.span < kMaxTokens),
              "span=", spec.span, " page_rows=", spec.page_rows);
    if (spec.window > 0) spec.span = std::numeric_limits<int64_t>::max();  // closes no page
    pools_.emplace_back(spec.pages, lag);
    row_positions_.emplace_back(spec.window > 0 ? 0 : spec.pages * spec.page_rows);
    first_key_.push_back(num_keys);
    num_keys += spec.columns * max_sessions;
    state.groups.push_back({PageList(0), {}, 0, {}});
  }
  is_dirty_.assign(num_keys, 0);
  dirty_.reserve(num_keys);
  dropped_.resize(specs_.size());
  sessions_.assign(max_sessions, state);
  for (State& s : sessions_) {
    for (size_t g = 0; g < specs_.size(); ++g) {
      s.groups[g].list = PageList(specs_[g].columns);
      s.groups[g].spare.reserve(specs_[g].columns);
    }
  }
  for (int64_t slot = max_sessions - 1; slot >= 0; --slot) free_slots_.push_back(slot);
}

const PageTable::State& PageTable::find(Session session) const {
  const auto [slot, epoch] = session;
  if (slot < 0 || slot >= static_cast<int64_t>(sessions_.size()) ||
      sessions_[slot].phase == Phase::kClosed || sessions_[slot].epoch != epoch) {
    throw UnknownSession(slot, epoch);
  }
  return sessions_[slot];
}

PageTable::State& PageTable::find(Session session, Phase phase, const char* verb) {
  State& s = const_cast<State&>(find(session));
  if (s.phase != phase) {
    constexpr const char* kPhases[] = {"closed", "at rest", "in a transaction", "suspended"};
    throw StateError(concat(verb, ": slot=", session.slot, " is ",
                            kPhases[static_cast<int>(s.phase)], ", not ",
                            kPhases[static_cast<int>(phase)]));
  }
  return s;
}

void PageTable::check_budgets(const Budgets& budgets) const {
  for (int c = 0; c < kNumClasses; ++c) {
    TML_CHECK(budgets[c] > 0, class_name(static_cast<PageClass>(c)), "=", budgets[c]);
  }
}

Session PageTable::open(const Budgets& budgets, int64_t priority) {
  check_budgets(budgets);
  if (free_slots_.empty()) throw OutOfSessions(sessions_.size());
  const int64_t slot = free_slots_.back();
  free_slots_.pop_back();
  State& s = sessions_[slot];
  s.phase = Phase::kOpen;
  s.epoch += 1;
  s.priority = priority;
  s.length = 0;
  s.mark = -1;
  s.last_tick = tick_;
  s.budgets = budgets;
  return {slot, s.epoch};
}

void PageTable::close(Session session) {
  State& s = const_cast<State&>(find(session));
  end_transaction(s);
  for (size_t g = 0; g < specs_.size(); ++g) {
    while (s.groups[g].list.size() > 0) remove(s, g, s.groups[g].list.size() - 1);
    s.groups[g].rolled_to = 0;
    s.groups[g].positions.clear();
  }
  s.phase = Phase::kClosed;
  s.length = 0;
  free_slots_.push_back(session.slot);
}

int64_t PageTable::roll(Session session, int64_t group, int64_t pages) {
  State& s = find(session, Phase::kOpen, "roll");
  TML_CHECK(group >= 0 && group < num_groups(), "group=", group);
  TML_CHECK(specs_[group].window == 0, "group=", group, " rolls by its window");
  TML_CHECK(pages >= 0, "pages=", pages);
  PageList& list = s.groups[group].list;
  int64_t freed = 0;
  for (const PageClass cls : kEvictionOrder) {
    int32_t index = list.oldest(cls);
    while (index >= 0 && freed < pages) {
      int32_t next = list.newer_of_class(index);
      if (index != open_page(s, group, cls, s.length) &&
          pools_[group].refs(list[index].page) == 1) {
        if (next == list.size() - 1) next = index;  // where remove() moves it
        freed += remove(s, group, index);
        ++dropped_[group][static_cast<int>(cls)];
      }
      index = next;
    }
  }
  return freed;
}

int64_t PageTable::mark(Session session) {
  State& s = find(session, Phase::kOpen, "mark");
  return s.mark = s.length;
}

std::vector<CopyCommand> PageTable::rewind_to_mark(Session session) {
  const State& s = find(session, Phase::kOpen, "rewind");
  if (s.mark < 0) throw StateError(concat("rewind: slot=", session.slot, " has no mark"));
  return rewind(session, s.mark);
}

std::vector<CopyCommand> PageTable::rewind(Session session, int64_t position) {
  State& s = find(session, Phase::kOpen, "rewind");
  TML_CHECK(position >= 0 && position <= s.length, "position=", position, " length=", s.length);
  for (size_t g = 0; g < specs_.size(); ++g) {
    const int64_t rolled_to = s.groups[g].rolled_to;
    const int64_t oldest = rolled_to == 0 ? 0 : rolled_to + specs_[g].window - 1;
    if (position < oldest) throw WindowPassed(g, position, oldest);
  }
  std::vector<std::pair<size_t, PageClass>> copies;
  for (size_t g = 0; g < specs_.size(); ++g) {
    int64_t needed = 0;
    for (const PageClass cls : kClasses) {
      const int32_t index = open_page(s, g, cls, position);
      if (index < 0 || pools_[g].refs(s.groups[g].list[index].page) == 1) continue;
      copies.emplace_back(g, cls);
      ++needed;
    }
    need(g, needed);
  }
  drop_from(s, position);
  if (s.mark > position) s.mark = -1;
  std::vector<CopyCommand> commands;
  for (const auto& [g, cls] : copies) {
    commands.push_back(own(s, g, s.groups[g].list.newest(cls)));
  }
  return commands;
}

std::pair<Session, std::vector<CopyCommand>> PageTable::fork(Session session, int64_t priority) {
  const State& parent = find(session, Phase::kOpen, "fork");
  if (free_slots_.empty()) throw OutOfSessions(sessions_.size());
  for (size_t g = 0; g < specs_.size(); ++g) {
    int64_t num_open = 0;
    for (const PageClass cls : kClasses) num_open += open_page(parent, g, cls, parent.length) >= 0;
    need(g, num_open);
  }
  const Session handle = open(parent.budgets, priority);
  State& child = sessions_[handle.slot];
  child.length = parent.length;
  std::vector<CopyCommand> commands;
  for (size_t g = 0; g < specs_.size(); ++g) {
    PageList& list = child.groups[g].list;
    list = parent.groups[g].list;
    child.groups[g].rolled_to = parent.groups[g].rolled_to;
    for (int32_t i = 0; i < list.size(); ++i) {
      pools_[g].share(list[i].page);
      touch(child, g, i);
    }
    for (const PageClass cls : kClasses) {
      const int32_t index = open_page(child, g, cls, child.length);
      if (index >= 0) commands.push_back(own(child, g, index));
    }
  }
  return {handle, commands};
}

Session PageTable::victim(Session session) const {
  const State& own = find(session);
  const State* best = nullptr;
  for (const State& s : sessions_) {
    if (s.phase != Phase::kOpen || &s == &own || s.priority > own.priority) continue;
    if (best == nullptr ||
        std::pair(s.priority, s.last_tick) < std::pair(best->priority, best->last_tick)) {
      best = &s;
    }
  }
  return best == nullptr ? session : Session{slot_of(*best), best->epoch};
}

void PageTable::tick(int64_t n) {
  TML_CHECK(n > tick_, "n=", n, " last=", tick_);
  tick_ = n;
  for (PagePool& pool : pools_) {
    const int64_t before = pool.num_waiting();
    pool.advance(n);
    work_ += before - pool.num_waiting();
  }
}

// Of a group without a window: the positions of an entry's rows.
const int64_t* PageTable::row_positions(const State& s, size_t g, int32_t index) const {
  const auto& [list, spare, rolled_to, positions] = s.groups[g];
  const int64_t rows = specs_[g].page_rows;
  return s.phase == Phase::kSuspended ? positions.data() + index * rows
                                      : row_positions_[g].data() + list[index].page * rows;
}

int64_t PageTable::position(const State& s, size_t g, int32_t index, int32_t row) const {
  if (specs_[g].window > 0) return s.groups[g].list[index].base + row;
  return row_positions(s, g, index)[row];
}

// How many of an entry's rows lie below `position`.
int32_t PageTable::used_below(const State& s, size_t g, int32_t index, int64_t position) const {
  const PageEntry& entry = s.groups[g].list[index];
  if (specs_[g].window > 0) return std::clamp<int64_t>(position - entry.base, 0, entry.used);
  const int64_t* first = row_positions(s, g, index);
  if (first[entry.used - 1] < position) return entry.used;
  return std::lower_bound(first, first + entry.used, position) - first;
}

// The page that a token of the class at `position` may go to, when the tokens from there on are
// dropped; -1 where there is none. O(1) at the session's length, else O(pages from `position` on).
int32_t PageTable::open_page(const State& s, size_t g, PageClass cls, int64_t position) const {
  const PageList& list = s.groups[g].list;
  int32_t index = list.newest(cls);
  while (index >= 0 && list[index].base >= position) index = list.older_of_class(index);
  const bool open = index >= 0 && position - list[index].base < specs_[g].span &&
                    used_below(s, g, index, position) < specs_[g].page_rows;
  return open ? index : -1;
}

void PageTable::need(size_t g, int64_t pages) const {
  if (pages <= pools_[g].num_free()) return;
  int64_t sum = 0;
  for (const State& s : sessions_) sum += evictable_in(s, g);
  throw OutOfPages(g, pages, pools_[g].num_free(), sum);
}

int64_t PageTable::evictable(Session session, int64_t group) const {
  TML_CHECK(group >= 0 && group < static_cast<int64_t>(specs_.size()), "group=", group);
  return evictable_in(find(session), group);
}

int64_t PageTable::evictable_in(const State& s, size_t g) const {
  if (s.phase != Phase::kOpen || specs_[g].window > 0) return 0;
  const PageList& list = s.groups[g].list;
  int64_t count = 0;
  for (const PageClass cls : kEvictionOrder) {
    const int32_t open = open_page(s, g, cls, s.length);
    for (int32_t i = list.oldest(cls); i >= 0; i = list.newer_of_class(i)) {
      count += i != open && pools_[g].refs(list[i].page) == 1;
    }
  }
  return count;
}

int32_t PageTable::take(size_t g) {
  ++work_;
  return pools_[g].take();
}

bool PageTable::remove(State& s, size_t g, int32_t index) {
  PageList& list = s.groups[g].list;
  const int32_t page = list[index].page;
  touch(s, g, index);
  touch(s, g, list.size() - 1);
  list.remove(index);
  return page >= 0 && pools_[g].release(page, tick_);
}

void PageTable::touch(const State& s, size_t g, int32_t index) {
  ++work_;
  const int64_t slot = slot_of(s);
  uint8_t& is_dirty = is_dirty_[first_key_[g] + slot * specs_[g].columns + index];
  if (is_dirty != 0) return;
  is_dirty = 1;
  dirty_.push_back({static_cast<int32_t>(g), static_cast<int32_t>(slot), index});
}

// Gives the session a page of its own in place of one that it shares and will write to.
CopyCommand PageTable::own(State& s, size_t g, int32_t index) {
  PageEntry& entry = s.groups[g].list[index];
  const int32_t from = entry.page;
  entry.page = take(g);
  pools_[g].release(from, tick_);
  if (specs_[g].window == 0) {
    const int64_t rows = specs_[g].page_rows;
    int64_t* positions = row_positions_[g].data();
    std::copy_n(positions + from * rows, entry.used, positions + entry.page * rows);
  }
  touch(s, g, index);
  return {static_cast<int64_t>(g), from, entry.page, entry.used};
}

}  // namespace tml
