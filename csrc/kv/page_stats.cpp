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

void PageTable::take_deltas(int64_t* out) {
  for (const auto& [g, slot, index] : dirty_) {
    const State& s = sessions_[slot];
    const PageList& list = s.groups[g].list;
    int64_t page = -1, base = 0, rows = 0;
    if (index < list.size() && list[index].page >= 0) {
      page = list[index].page;
      base = list[index].base;
      // A page that is still being filled is bounded by causality alone.
      rows = index == open_tail(s, g) ? specs_[g].page_rows : list[index].used;
    }
    for (const int64_t word : {int64_t{g}, int64_t{slot}, int64_t{index}, page, base, rows}) {
      *out++ = word;
    }
    is_dirty_[first_key_[g] + slot * specs_[g].columns + index] = 0;
  }
  dirty_.clear();
}

std::vector<PageRef> PageTable::pages(Session session, int64_t group) const {
  const State& s = find(session);
  TML_CHECK(group >= 0 && group < static_cast<int64_t>(specs_.size()), "group=", group);
  const PageList& list = s.groups[group].list;
  std::vector<PageRef> refs;
  for (int32_t i = 0; i < list.size(); ++i) {
    refs.push_back({group, list[i].page, list[i].base, list[i].used, list[i].cls});
  }
  return refs;
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
    const int32_t tail = s.phase == Phase::kSuspended ? -1 : open_tail(s, g);
    require(tail < 0 || pools_[g].refs(group.list[tail].page) == 1, "the open page is shared");
    check_list(s, g);
  }
}

void PageTable::check_list(const State& s, size_t g) const {
  const PageList& list = s.groups[g].list;
  const GroupSpec& spec = specs_[g];
  int64_t seen = 0, end = 0;
  for (int32_t i = list.oldest(); i >= 0; i = list.newer(i), ++seen) {
    const PageEntry& entry = list[i];
    require(entry.used > 0 && entry.used <= spec.page_rows, "used=", entry.used);
    require(entry.base >= end, "pages overlap: base=", entry.base, " end=", end);
    require(spec.window == 0 || seen == 0 || entry.base == end, "a hole in a window");
    end = entry.end();
  }
  require(seen == list.size() && end <= s.length, "ages: seen=", seen, " end=", end);
  if (spec.window > 0) {
    const int64_t needed_from = std::max<int64_t>(0, s.length - spec.window + 1);
    require(needed_from == s.length ||
                (list.size() > 0 && end == s.length && list[list.oldest()].base <= needed_from),
            "a window without its keys, length=", s.length);
  }
  for (int c = 0; c < kNumClasses; ++c) {
    const auto cls = static_cast<PageClass>(c);
    int64_t count = 0;
    end = 0;
    for (int32_t i = list.oldest(cls); i >= 0; i = list.newer_of_class(i), ++count) {
      require(list[i].cls == cls && list[i].base >= end, "class chain of ", class_name(cls));
      end = list[i].end();
    }
    require(count == list.count(cls), "class count of ", class_name(cls));
    require(spec.window > 0 || s.phase == Phase::kReserved || count <= s.budgets[c],
            "over budget at rest: ", class_name(cls));
  }
}

}  // namespace tml
