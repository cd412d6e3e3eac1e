// What a page table tells about itself: deltas, pages, figures, and whether they agree.
#include <algorithm>

#include "page_table.h"

namespace tml {
namespace {

template <typename... Values>
void require(bool cond, const char* what, const Values&... values) {
  if (!cond) throw StateError(concat("invariant: ", what, values...));
}

}  // namespace

int64_t PageTable::first_key(int64_t group) const {
  TML_CHECK(group >= 0 && group < num_groups(), "group=", group);
  return first_key_[group];
}

int64_t PageTable::num_placed() const {
  return std::count_if(specs_.begin(), specs_.end(), [](const auto& s) { return s.window == 0; });
}

void PageTable::place(const int64_t* rows, const int64_t* positions, int64_t num_tokens,
                      int64_t* placed_rows, int64_t* placed_positions) const {
  int64_t first_row = 0;
  for (const GroupSpec& spec : specs_) {
    if (spec.window == 0) {
      for (int64_t t = 0; t < num_tokens; ++t) {
        placed_rows[t] = rows[t] < 0 ? -1 : first_row + rows[t];
      }
      placed_rows += num_tokens;
      placed_positions = std::copy_n(positions, num_tokens, placed_positions);
      first_row += spec.pages * spec.page_rows;
    }
    rows += num_tokens;
  }
}

void PageTable::take_deltas(int64_t* out) {
  for (const auto& [g, slot, index] : dirty_) {
    const PageList& list = sessions_[slot].groups[g].list;
    const int64_t key = first_key_[g] + slot * specs_[g].columns + index;
    int64_t page = -1, base = 0, rows = 0;
    if (index < list.size() && list[index].page >= 0) {
      page = list[index].page;
      base = list[index].base;
      rows = specs_[g].window > 0 ? specs_[g].page_rows : list[index].used;
    }
    for (const int64_t word : {key, page, base, rows}) *out++ = word;
    is_dirty_[key] = 0;
  }
  dirty_.clear();
}

void PageTable::send_again() {
  for (const State& s : sessions_) {
    for (size_t g = 0; g < specs_.size(); ++g) {
      for (int32_t index = 0; index < specs_[g].columns; ++index) touch(s, g, index);
    }
  }
}

std::vector<PageRef> PageTable::pages(Session session, int64_t group) const {
  const State& s = find(session);
  TML_CHECK(group >= 0 && group < num_groups(), "group=", group);
  const PageList& list = s.groups[group].list;
  std::vector<PageRef> refs;
  for (int32_t i = 0; i < list.size(); ++i) {
    refs.push_back({group, list[i].page, list[i].base, list[i].used, list[i].cls});
  }
  return refs;
}

std::vector<std::vector<int64_t>> PageTable::positions(Session session, int64_t group) const {
  const State& s = find(session);
  TML_CHECK(group >= 0 && group < num_groups(), "group=", group);
  const PageList& list = s.groups[group].list;
  std::vector<std::vector<int64_t>> all(list.size());
  for (int32_t i = 0; i < list.size(); ++i) {
    for (int32_t row = 0; row < list[i].used; ++row) all[i].push_back(position(s, group, i, row));
  }
  return all;
}

std::vector<int64_t> PageTable::lengths() const {
  std::vector<int64_t> lengths;
  lengths.reserve(sessions_.size());
  for (const State& s : sessions_) lengths.push_back(s.phase == Phase::kClosed ? -1 : s.length);
  return lengths;
}

PageCounts PageTable::held(const std::vector<Session>& sessions, int64_t group) const {
  TML_CHECK(group >= 0 && group < num_groups(), "group=", group);
  PageCounts counts{};
  for (const Session session : sessions) {
    const PageList& list = find(session).groups[group].list;
    for (const PageClass cls : kClasses) counts[static_cast<int>(cls)] += list.count(cls);
  }
  return counts;
}

SessionStats PageTable::stats(Session session) const {
  const State& s = find(session);
  SessionStats stats{
      s.length, s.priority, s.phase == Phase::kReserved, s.phase == Phase::kSuspended, {}};
  for (const Group& group : s.groups) {
    stats.pages.emplace_back();
    for (int c = 0; c < kNumClasses; ++c) {
      stats.pages.back()[c] = group.list.count(static_cast<PageClass>(c));
    }
  }
  return stats;
}

std::vector<GroupStats> PageTable::stats() const {
  std::vector<GroupStats> all;
  for (size_t g = 0; g < specs_.size(); ++g) {
    GroupStats stats{specs_[g].pages, pools_[g].num_free(), pools_[g].num_waiting(), 0, 0, 0};
    for (const State& s : sessions_) stats.reserved += s.groups[g].spare.size();
    for (int32_t page = 1; page < stats.pages; ++page) {
      stats.held += pools_[g].refs(page) > 0;
      stats.shared += pools_[g].refs(page) > 1;
    }
    stats.held -= stats.reserved;
    all.push_back(stats);
  }
  return all;
}

void PageTable::check_invariants() const {
  std::vector<std::vector<int32_t>> refs;
  for (const GroupSpec& spec : specs_) refs.emplace_back(spec.pages, 0);
  int64_t num_open = 0;
  for (const State& s : sessions_) {
    num_open += s.phase != Phase::kClosed;
    check_session(s, refs);
  }
  require(num_open == num_sessions(), "sessions=", num_open);
  for (size_t g = 0; g < specs_.size(); ++g) {
    std::vector<int32_t> idle(specs_[g].pages, 0);
    for (const int32_t page : pools_[g].idle_pages()) ++idle[page];
    require(idle[0] == 0 && refs[g][0] == 0, "the zero page is in use, group=", g);
    for (int32_t page = 1; page < specs_[g].pages; ++page) {
      require(refs[g][page] == pools_[g].refs(page), "references, page=", page);
      require(idle[page] == (refs[g][page] == 0), "free or held, once, page=", page);
    }
  }
  std::vector<uint8_t> dirty(is_dirty_.size(), 0);
  for (const auto& [g, slot, index] : dirty_) {
    dirty[first_key_[g] + slot * specs_[g].columns + index] += 1;
  }
  require(dirty == is_dirty_, "deltas are listed once");
}

void PageTable::check_session(const State& s, std::vector<std::vector<int32_t>>& refs) const {
  for (size_t g = 0; g < specs_.size(); ++g) {
    const Group& group = s.groups[g];
    require(s.phase != Phase::kClosed || group.list.size() == 0, "closed, but has pages");
    require(s.phase == Phase::kReserved || group.spare.empty(), "pages reserved at rest");
    for (const int32_t page : group.spare) {
      require(++refs[g][page] == 1, "reserved page is in use, page=", page);
    }
    for (int32_t i = 0; i < group.list.size(); ++i) {
      const int32_t page = group.list[i].page;
      require((page < 0) == (s.phase == Phase::kSuspended), "pages of a suspended session");
      if (page >= 0) ++refs[g][page];
    }
    require(s.phase == Phase::kSuspended || group.positions.empty(), "positions saved at rest");
    const std::string what = fault(s, g);
    require(what.empty(), what.c_str(), ", group=", g);
    if (s.phase == Phase::kSuspended) continue;
    for (const PageClass cls : kClasses) {
      const int32_t open = open_page(s, g, cls, s.length);
      require(open < 0 || pools_[g].refs(group.list[open].page) == 1, "the open page is shared");
    }
  }
}

// What contradicts itself in a session's pages of one group, empty if nothing does.
std::string PageTable::fault(const State& s, size_t g) const {
  const auto& [list, spare, rolled_to, saved] = s.groups[g];
  const GroupSpec& spec = specs_[g];
  if (list.size() > spec.columns) return concat("columns: pages=", list.size());
  int64_t seen = 0, newest_base = -1;
  std::vector<int64_t> all;
  for (int32_t i = list.oldest(); i >= 0; i = list.newer(i), ++seen) {
    const std::string what = page_fault(s, g, i);
    if (!what.empty()) return what;
    if (list[i].base <= newest_base) return concat("ages: base=", list[i].base);
    newest_base = list[i].base;
    for (int32_t row = 0; row < list[i].used; ++row) all.push_back(position(s, g, i, row));
  }
  if (seen != list.size()) return concat("ages: seen=", seen, " pages=", list.size());
  std::sort(all.begin(), all.end());
  const auto twice = std::adjacent_find(all.begin(), all.end());
  if (twice != all.end()) return concat("position=", *twice, " is there twice");
  for (const PageClass cls : kClasses) {
    const std::string what = class_fault(s, g, cls);
    if (!what.empty()) return what;
  }
  if (spec.window == 0) return rolled_to == 0 ? "" : concat("rolled_to=", rolled_to);
  const bool is_whole = all.empty() ? rolled_to == s.length
                                    : all.front() == rolled_to && all.back() == s.length - 1 &&
                                          all.back() - all.front() + 1 == int64_t(all.size());
  if (!is_whole || rolled_to > std::max<int64_t>(0, s.length - spec.window + 1)) {
    return concat("a window without its keys: rolled_to=", rolled_to, " length=", s.length);
  }
  return "";
}

std::string PageTable::page_fault(const State& s, size_t g, int32_t index) const {
  const auto& [page, used, base, cls] = s.groups[g].list[index];
  if (used <= 0 || used > specs_[g].page_rows) return concat("used=", used, " base=", base);
  if (base < 0 || position(s, g, index, 0) != base) {
    return concat("position=", position(s, g, index, 0), " base=", base);
  }
  for (int32_t row = 1; row < used; ++row) {
    const int64_t here = position(s, g, index, row);
    if (here <= position(s, g, index, row - 1)) return concat("position=", here, " descends");
  }
  const int64_t last = position(s, g, index, used - 1);
  if (last >= s.length) return concat("position=", last, " length=", s.length);
  if (last - base >= specs_[g].span) return concat("position=", last, " leaves base=", base);
  return "";
}

std::string PageTable::class_fault(const State& s, size_t g, PageClass cls) const {
  const PageList& list = s.groups[g].list;
  int64_t count = 0;
  for (int32_t i = list.oldest(cls); i >= 0; i = list.newer_of_class(i), ++count) {
    if (list[i].cls != cls) return concat("class chain of ", class_name(cls));
    const int32_t older = list.older_of_class(i);
    if (older < 0) continue;
    const int64_t base = list[i].base;
    if (base <= position(s, g, older, list[older].used - 1)) {
      return concat("pages of ", class_name(cls), " overlap: base=", base);
    }
    if (list[older].used < specs_[g].page_rows && base - list[older].base < specs_[g].span) {
      return concat("page of ", class_name(cls), " was closed early: base=", list[older].base);
    }
  }
  if (count != list.count(cls)) return concat("class count of ", class_name(cls));
  const int64_t budget = s.budgets[static_cast<int>(cls)];
  if (specs_[g].window == 0 && s.phase != Phase::kReserved && count > budget) {
    return concat(class_name(cls), ": pages=", count, " budget=", budget);
  }
  return "";
}

}  // namespace tml
