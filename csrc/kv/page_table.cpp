#include "page_table.h"

#include <algorithm>

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
  for (const GroupSpec& spec : specs_) {
    TML_CHECK(spec.pages > 1 && spec.pages < kMaxTokens, "pages=", spec.pages);
    TML_CHECK(spec.columns > 0 && spec.columns < kMaxTokens, "columns=", spec.columns);
    TML_CHECK(spec.page_rows > 0 && spec.page_rows < kMaxTokens, "page_rows=", spec.page_rows);
    TML_CHECK(spec.window >= 0 && spec.window < kMaxTokens, "window=", spec.window);
    TML_CHECK(spec.history >= 0 && spec.history < kMaxTokens, "history=", spec.history);
    TML_CHECK(spec.history == 0 || spec.window > 0, "history=", spec.history, " window=0");
    pools_.emplace_back(spec.pages, lag);
    first_key_.push_back(num_keys);
    num_keys += spec.columns * max_sessions;
    state.groups.push_back({PageList(0), {}, 0});
  }
  is_dirty_.assign(num_keys, 0);
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

Session PageTable::open(const Budgets& budgets, int64_t priority) {
  for (int c = 0; c < kNumClasses; ++c) {
    TML_CHECK(budgets[c] > 0, class_name(static_cast<PageClass>(c)), "=", budgets[c]);
  }
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
  }
  s.phase = Phase::kClosed;
  s.length = 0;
  free_slots_.push_back(session.slot);
}

int64_t PageTable::roll(Session session, int64_t group, int64_t pages) {
  State& s = find(session, Phase::kOpen, "roll");
  TML_CHECK(group >= 0 && group < static_cast<int64_t>(specs_.size()), "group=", group);
  TML_CHECK(specs_[group].window == 0, "group=", group, " rolls by its window");
  TML_CHECK(pages >= 0, "pages=", pages);
  PageList& list = s.groups[group].list;
  int64_t freed = 0;
  for (const PageClass cls : kEvictionOrder) {
    int32_t index = list.oldest(cls);
    while (index >= 0 && freed < pages) {
      int32_t next = list.newer_of_class(index);
      if (index != list.newest() && pools_[group].refs(list[index].page) == 1) {
        if (next == list.size() - 1) next = index;  // where remove() moves it
        freed += remove(s, group, index);
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
  std::vector<bool> copies;
  for (size_t g = 0; g < specs_.size(); ++g) {
    const int64_t rolled_to = s.groups[g].rolled_to;
    const int64_t oldest = rolled_to == 0 ? 0 : rolled_to + specs_[g].window - 1;
    if (position < oldest) throw WindowPassed(g, position, oldest);
    const int32_t tail = tail_at(s, g, position);
    copies.push_back(tail >= 0 && pools_[g].refs(s.groups[g].list[tail].page) > 1);
    need(g, copies.back());
  }
  drop_from(s, position);
  if (s.mark > position) s.mark = -1;
  std::vector<CopyCommand> commands;
  for (size_t g = 0; g < specs_.size(); ++g) {
    if (copies[g]) commands.push_back(own(s, g, s.groups[g].list.newest()));
  }
  return commands;
}

std::pair<Session, std::vector<CopyCommand>> PageTable::fork(Session session, int64_t priority) {
  const State& parent = find(session, Phase::kOpen, "fork");
  if (free_slots_.empty()) throw OutOfSessions(sessions_.size());
  for (size_t g = 0; g < specs_.size(); ++g) need(g, open_tail(parent, g) >= 0);
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
    const int32_t tail = open_tail(child, g);
    if (tail >= 0) commands.push_back(own(child, g, tail));
  }
  return {handle, commands};
}

std::vector<PageRef> PageTable::suspend(Session session) {
  State& s = find(session, Phase::kOpen, "suspend");
  std::vector<PageRef> saved;
  for (size_t g = 0; g < specs_.size(); ++g) {
    const auto refs = pages(session, g);
    saved.insert(saved.end(), refs.begin(), refs.end());
  }
  for (size_t g = 0; g < specs_.size(); ++g) {
    PageList& list = s.groups[g].list;
    for (int32_t i = 0; i < list.size(); ++i) {
      pools_[g].release(list[i].page, tick_);
      list[i].page = -1;
      touch(s, g, i);
    }
  }
  s.phase = Phase::kSuspended;
  return saved;
}

std::vector<PageRef> PageTable::resume(Session session) {
  State& s = find(session, Phase::kSuspended, "resume");
  for (size_t g = 0; g < specs_.size(); ++g) need(g, s.groups[g].list.size());
  std::vector<PageRef> restored;
  for (size_t g = 0; g < specs_.size(); ++g) {
    PageList& list = s.groups[g].list;
    for (int32_t i = 0; i < list.size(); ++i) {
      list[i].page = take(g);
      touch(s, g, i);
    }
    const auto refs = pages(session, g);
    restored.insert(restored.end(), refs.begin(), refs.end());
  }
  s.phase = Phase::kOpen;
  s.last_tick = tick_;
  return restored;
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

// The page that the next token may go to: the newest, where it ends at the session's end and has
// room. No other session holds it. -1 where there is none.
int32_t PageTable::open_tail(const State& s, size_t g) const {
  const PageList& list = s.groups[g].list;
  const int32_t index = list.newest();
  const bool open =
      index >= 0 && list[index].end() == s.length && list[index].used < specs_[g].page_rows;
  return open ? index : -1;
}

void PageTable::need(size_t g, int64_t pages) const {
  if (pages <= pools_[g].num_free()) return;
  int64_t sum = 0;
  for (const State& s : sessions_) sum += evictable(s, g);
  throw OutOfPages(g, pages, pools_[g].num_free(), sum);
}

int64_t PageTable::evictable(const State& s, size_t g) const {
  if (s.phase != Phase::kOpen || specs_[g].window > 0) return 0;
  const PageList& list = s.groups[g].list;
  int64_t count = 0;
  for (int32_t i = 0; i < list.size(); ++i) {
    count += i != list.newest() && list[i].cls != PageClass::kAnchor &&
             pools_[g].refs(list[i].page) == 1;
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

// What open_tail() would be after a rewind to `position`.
int32_t PageTable::tail_at(const State& s, size_t g, int64_t position) const {
  const PageList& list = s.groups[g].list;
  int32_t index = list.newest();
  while (index >= 0 && list[index].base >= position) index = list.older(index);
  const bool open = index >= 0 && list[index].end() >= position &&
                    position - list[index].base < specs_[g].page_rows;
  return open ? index : -1;
}

// Gives the session a page of its own in place of one that it shares and will write to.
CopyCommand PageTable::own(State& s, size_t g, int32_t index) {
  PageEntry& entry = s.groups[g].list[index];
  const int32_t from = entry.page;
  entry.page = take(g);
  pools_[g].release(from, tick_);
  touch(s, g, index);
  return {static_cast<int64_t>(g), from, entry.page, entry.used};
}

}  // namespace tml
