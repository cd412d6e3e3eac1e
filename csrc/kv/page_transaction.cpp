// A session's tick: reserve, append, and commit or roll back.
#include <algorithm>

#include "page_table.h"

namespace tml {
namespace {

constexpr int64_t kMaxPosition = int64_t{1} << 62;  // sums of positions stay in int64
constexpr PageClass kUnclassed = PageClass::kText;  // of all pages in a group with a window

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

std::vector<int64_t> PageTable::reserve(Session session, const std::vector<Run>& runs) {
  State& s = find(session, Phase::kOpen, "reserve");
  int64_t total = 0;
  for (const auto& [cls, tokens] : runs) {
    TML_CHECK(static_cast<int>(cls) < kNumClasses, "class=", static_cast<int>(cls));
    TML_CHECK(tokens >= 0 && tokens <= kMaxTokens - total, class_name(cls), "=", tokens);
    total += tokens;
  }
  TML_CHECK(s.length <= kMaxPosition - total, "length=", s.length, " tokens=", total);
  std::vector<int64_t> needed;
  for (size_t g = 0; g < specs_.size(); ++g) {
    const PageList& list = s.groups[g].list;
    const auto [pages, anchors] = worst_case(s, g, runs);
    if (list.size() + pages > specs_[g].columns) {
      throw BudgetExceeded("columns", list.size() + pages, specs_[g].columns);
    }
    const int64_t all_anchors = list.count(PageClass::kAnchor) + anchors;
    if (all_anchors > s.budgets[0]) throw BudgetExceeded("anchor", all_anchors, s.budgets[0]);
    needed.push_back(pages);
  }
  for (size_t g = 0; g < specs_.size(); ++g) need(g, needed[g]);
  s.runs = runs;
  s.run = 0;
  s.start = s.length;
  s.phase = Phase::kReserved;
  for (size_t g = 0; g < specs_.size(); ++g) {
    for (int64_t i = 0; i < needed[g]; ++i) s.groups[g].spare.push_back(take(g));
  }
  return needed;
}

Appended PageTable::append(Session session, PageClass cls, int64_t tokens) {
  State& s = find(session, Phase::kReserved, "append");
  TML_CHECK(tokens >= 0, "tokens=", tokens);
  Appended appended{s.length, {}};
  if (tokens == 0) return appended;
  int64_t left = 0;
  size_t run = s.run;
  for (; run < s.runs.size(); ++run) {
    if (s.runs[run].first == cls) left = std::max(left, s.runs[run].second);
    if (left >= tokens) break;
  }
  if (run == s.runs.size()) throw ReservationExceeded(class_name(cls), tokens, left);
  s.run = run;
  s.runs[run].second -= tokens;
  for (size_t g = 0; g < specs_.size(); ++g) fill(s, g, cls, tokens, appended.spans);
  s.length += tokens;
  return appended;
}

void PageTable::commit(Session session) {
  State& s = find(session, Phase::kReserved, "commit");
  end_transaction(s);
  s.last_tick = tick_;
  for (size_t g = 0; g < specs_.size(); ++g) {
    auto& [list, spare, rolled_to] = s.groups[g];
    if (specs_[g].window > 0) {
      const int64_t needed_from = s.length - specs_[g].history - specs_[g].window + 1;
      while (list.oldest() != list.newest() && list[list.oldest()].end() <= needed_from) {
        rolled_to = list[list.oldest()].end();
        remove(s, g, list.oldest());
      }
      continue;
    }
    for (const PageClass cls : kEvictionOrder) {
      const int64_t budget = s.budgets[static_cast<int>(cls)];
      while (list.count(cls) > budget) remove(s, g, list.oldest(cls));
    }
  }
}

void PageTable::roll_back(Session session) {
  State& s = find(session, Phase::kReserved, "roll_back");
  drop_from(s, s.start);
  end_transaction(s);
}

// Pages that `runs` can take at most, and how many of them are anchors. Fewer tokens in any run
// never take more: a run that is left out only joins its neighbours.
std::pair<int64_t, int64_t> PageTable::worst_case(const State& s, size_t g,
                                                  const std::vector<Run>& runs) const {
  const PageList& list = s.groups[g].list;
  const int64_t rows = specs_[g].page_rows;
  const int32_t tail = open_tail(s, g);
  int64_t room = tail < 0 ? 0 : rows - list[tail].used;
  PageClass last = tail < 0 ? kUnclassed : list[tail].cls;
  int64_t pages = 0, anchors = 0;
  for (const auto& [run_class, tokens] : runs) {
    if (tokens == 0) continue;
    const PageClass cls = specs_[g].window > 0 ? kUnclassed : run_class;
    if (cls != last) room = 0;
    last = cls;
    const int64_t fresh = ceil_div(std::max<int64_t>(0, tokens - room), rows);
    room += fresh * rows - tokens;
    pages += fresh;
    if (cls == PageClass::kAnchor) anchors += fresh;
  }
  return {pages, anchors};
}

void PageTable::fill(State& s, size_t g, PageClass cls, int64_t tokens, std::vector<Span>& spans) {
  auto& [list, spare, rolled_to] = s.groups[g];
  const int64_t rows = specs_[g].page_rows;
  if (specs_[g].window > 0) cls = kUnclassed;
  int32_t index = open_tail(s, g);
  if (index >= 0 && list[index].cls != cls) {
    touch(s, g, index);  // closed: its unused rows are no positions any more
    index = -1;
  }
  for (int64_t done = 0; done < tokens;) {
    if (index < 0 || list[index].used == rows) {
      index = list.push({spare.back(), 0, s.length + done, cls});
      spare.pop_back();
      touch(s, g, index);
    }
    PageEntry& entry = list[index];
    const int64_t count = std::min(tokens - done, rows - entry.used);
    spans.push_back({static_cast<int64_t>(g), entry.page * rows + entry.used, count});
    entry.used += static_cast<int32_t>(count);
    done += count;
    ++work_;
  }
}

void PageTable::end_transaction(State& s) {
  for (size_t g = 0; g < specs_.size(); ++g) {
    auto& spare = s.groups[g].spare;
    for (; !spare.empty(); spare.pop_back(), ++work_) pools_[g].give_back(spare.back());
  }
  s.phase = Phase::kOpen;
}

void PageTable::drop_from(State& s, int64_t position) {
  s.length = position;
  for (size_t g = 0; g < specs_.size(); ++g) {
    PageList& list = s.groups[g].list;
    while (list.newest() >= 0 && list[list.newest()].base >= position) {
      remove(s, g, list.newest());
    }
    if (list.newest() < 0) continue;
    PageEntry& tail = list[list.newest()];
    tail.used = static_cast<int32_t>(std::min<int64_t>(tail.used, position - tail.base));
    touch(s, g, list.newest());
  }
}

}  // namespace tml
