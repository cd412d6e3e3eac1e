// A session's tick: reserve, append, and commit or roll back.
#include <algorithm>
#include <numeric>

#include "page_table.h"

namespace tml {
namespace {

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

int64_t PageTable::append(Session session, PageClass cls, int64_t tokens, int64_t* rows,
                          int64_t stride) {
  State& s = find(session, Phase::kReserved, "append");
  TML_CHECK(static_cast<int>(cls) < kNumClasses, "class=", static_cast<int>(cls));
  TML_CHECK(tokens >= 0, "tokens=", tokens);
  const int64_t first = s.length;
  if (tokens == 0) return first;
  int64_t left = 0;
  size_t run = s.run;
  for (; run < s.runs.size(); ++run) {
    if (s.runs[run].first == cls) left = std::max(left, s.runs[run].second);
    if (left >= tokens) break;
  }
  if (run == s.runs.size()) throw ReservationExceeded(class_name(cls), tokens, left);
  s.run = run;
  s.runs[run].second -= tokens;
  for (size_t g = 0; g < specs_.size(); ++g) fill(s, g, cls, tokens, rows + g * stride);
  s.length += tokens;
  return first;
}

void PageTable::commit(Session session) {
  State& s = find(session, Phase::kReserved, "commit");
  end_transaction(s);
  s.last_tick = tick_;
  for (size_t g = 0; g < specs_.size(); ++g) {
    auto& [list, spare, rolled_to, positions] = s.groups[g];
    if (specs_[g].window > 0) {
      const int64_t needed_from = s.length - specs_[g].history - specs_[g].window + 1;
      while (list.oldest() != list.newest()) {
        const int64_t end = list[list.oldest()].base + list[list.oldest()].used;
        if (end > needed_from) break;
        rolled_to = end;
        remove(s, g, list.oldest());
      }
      continue;
    }
    for (const PageClass cls : kEvictionOrder) {
      const int64_t budget = s.budgets[static_cast<int>(cls)];
      while (list.count(cls) > budget) {
        remove(s, g, list.oldest(cls));
        ++dropped_[g][static_cast<int>(cls)];
      }
    }
  }
}

void PageTable::roll_back(Session session) {
  State& s = find(session, Phase::kReserved, "roll_back");
  drop_from(s, s.start);
  end_transaction(s);
}

int64_t PageTable::reserve_all(const std::vector<Session>& sessions,
                               const std::vector<PageClass>& classes_R, const int64_t* tokens_S_R) {
  std::vector<Run> runs(classes_R.size());
  for (size_t i = 0; i < sessions.size(); ++i) {
    for (size_t r = 0; r < runs.size(); ++r) {
      runs[r] = {classes_R[r], tokens_S_R[i * runs.size() + r]};
    }
    try {
      reserve(sessions[i], runs);
    } catch (const std::exception&) {  // the caller asks again for this one
      return i;
    }
  }
  return sessions.size();
}

void PageTable::append_all(const std::vector<Session>& sessions,
                           const std::vector<PageClass>& classes_R, const int64_t* tokens_S_R,
                           const int64_t* column_S_R, int64_t* rows, int64_t stride,
                           int64_t* positions) {
  for (const Session session : sessions) {
    for (const PageClass cls : classes_R) {
      const int64_t tokens = *tokens_S_R++, column = *column_S_R++;
      TML_CHECK(tokens >= 0 && column >= 0 && column <= stride && tokens <= stride - column,
                "tokens=", tokens, " column=", column, " rows: T=", stride);
      const int64_t first = append(session, cls, tokens, rows + column, stride);
      std::iota(positions + column, positions + column + tokens, first);
    }
  }
}

void PageTable::commit_all(const std::vector<Session>& sessions) {
  for (auto session = sessions.begin(); session != sessions.end(); ++session) {
    find(*session, Phase::kReserved, "commit");
    TML_CHECK(std::find(sessions.begin(), session, *session) == session,
              "commit: slot=", session->slot, " is given twice");
  }
  for (const Session session : sessions) commit(session);
}

// Pages that `runs` take, and how many of them are anchors. Fewer tokens in any run never take
// more. For a page is a block of its class's tokens, at most page_rows of them within a span, and
// whatever is left of such a block is one too: leaving tokens out only draws the others together.
// So the blocks of all tokens still serve those that are left, and filling the open page first
// makes the fewest blocks that do.
std::pair<int64_t, int64_t> PageTable::worst_case(const State& s, size_t g,
                                                  const std::vector<Run>& runs) const {
  const auto& [num_pages, columns, rows, window, history, span] = specs_[g];
  struct OpenPage {
    int64_t base = 0, room = 0;
  };
  std::array<OpenPage, kNumClasses> open_pages;
  for (int c = 0; c < kNumClasses; ++c) {
    const int32_t index = open_page(s, g, static_cast<PageClass>(c), s.length);
    if (index < 0) continue;
    open_pages[c] = {s.groups[g].list[index].base, rows - s.groups[g].list[index].used};
  }
  int64_t pages = 0, anchors = 0, position = s.length;
  for (const auto& [run_class, tokens] : runs) {
    const PageClass cls = window > 0 ? kUnclassed : run_class;
    auto& [base, room] = open_pages[static_cast<int>(cls)];
    const int64_t old = std::clamp<int64_t>(span - (position - base), 0, std::min(tokens, room));
    // Positions of one run are contiguous, and a span has page_rows of them: new pages get full.
    const int64_t fresh = ceil_div(tokens - old, rows);
    room -= old;
    if (fresh > 0) {
      base = position + old + (fresh - 1) * rows;
      room = fresh * rows - (tokens - old);
    }
    position += tokens;
    pages += fresh;
    if (cls == PageClass::kAnchor) anchors += fresh;
  }
  return {pages, anchors};
}

void PageTable::fill(State& s, size_t g, PageClass cls, int64_t tokens, int64_t* rows) {
  auto& [list, spare, rolled_to, positions] = s.groups[g];
  const int64_t page_rows = specs_[g].page_rows, span = specs_[g].span;
  const bool has_window = specs_[g].window > 0;
  if (has_window) cls = kUnclassed;
  int32_t index = open_page(s, g, cls, s.length);
  for (int64_t done = 0; done < tokens;) {
    const int64_t position = s.length + done;
    if (index < 0 || list[index].used == page_rows || position - list[index].base >= span) {
      index = list.push({spare.back(), 0, position, cls});
      spare.pop_back();
      touch(s, g, index);
    }
    PageEntry& entry = list[index];
    const int64_t first = entry.page * page_rows + entry.used;
    const int64_t count =
        std::min({tokens - done, page_rows - entry.used, span - (position - entry.base)});
    std::iota(rows + done, rows + done + count, first);
    entry.used += static_cast<int32_t>(count);
    done += count;
    if (has_window) {
      ++work_;  // the table has had this page with all its rows
      continue;
    }
    int64_t* row_positions = row_positions_[g].data() + first;
    std::iota(row_positions, row_positions + count, position);
    touch(s, g, index);
  }
}

void PageTable::end_transaction(State& s) {
  for (size_t g = 0; g < specs_.size(); ++g) {
    auto& spare = s.groups[g].spare;
    for (; !spare.empty(); spare.pop_back(), ++work_) pools_[g].give_back(spare.back());
  }
  s.phase = Phase::kOpen;
}

// A page that reaches `position` from below is the newest of its class that is left: those after it
// have their base beyond.
void PageTable::drop_from(State& s, int64_t position) {
  for (size_t g = 0; g < specs_.size(); ++g) {
    PageList& list = s.groups[g].list;
    while (list.newest() >= 0 && list[list.newest()].base >= position) {
      remove(s, g, list.newest());
    }
    for (const PageClass cls : kClasses) {
      const int32_t index = list.newest(cls);
      if (index < 0) continue;
      const int32_t used = used_below(s, g, index, position);
      if (used == list[index].used) continue;
      list[index].used = used;
      if (specs_[g].window == 0) touch(s, g, index);
    }
  }
  s.length = position;
}

}  // namespace tml
