// A session off the device: suspended, or as an image that outlives its table.
#include <algorithm>

#include "page_table.h"

namespace tml {

std::vector<PageRef> PageTable::suspend(Session session) {
  State& s = find(session, Phase::kOpen, "suspend");
  std::vector<PageRef> saved;
  for (size_t g = 0; g < specs_.size(); ++g) {
    const auto refs = pages(session, g);
    saved.insert(saved.end(), refs.begin(), refs.end());
  }
  for (size_t g = 0; g < specs_.size(); ++g) {
    auto& [list, spare, rolled_to, positions] = s.groups[g];
    const int64_t rows = specs_[g].page_rows;
    if (specs_[g].window == 0) positions.resize(list.size() * rows);
    for (int32_t i = 0; i < list.size(); ++i) {
      if (specs_[g].window == 0) {
        std::copy_n(row_positions(s, g, i), list[i].used, positions.data() + i * rows);
      }
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
    auto& [list, spare, rolled_to, positions] = s.groups[g];
    const int64_t rows = specs_[g].page_rows;
    for (int32_t i = 0; i < list.size(); ++i) {
      list[i].page = take(g);
      touch(s, g, i);
      if (specs_[g].window > 0) continue;
      std::copy_n(row_positions(s, g, i), list[i].used,
                  row_positions_[g].data() + list[i].page * rows);
    }
    positions = {};
    const auto refs = pages(session, g);
    restored.insert(restored.end(), refs.begin(), refs.end());
  }
  s.phase = Phase::kOpen;
  s.last_tick = tick_;
  return restored;
}

SessionImage PageTable::image(Session session) const {
  const State& s = find(session);
  if (s.phase == Phase::kReserved) {
    throw StateError(concat("image: slot=", session.slot, " is in a transaction"));
  }
  SessionImage image{s.length, s.mark, s.priority, s.budgets, {}, {}};
  for (int64_t g = 0; g < num_groups(); ++g) {
    image.rolled_to.push_back(s.groups[g].rolled_to);
    auto rows = positions(session, g);
    const auto refs = pages(session, g);
    for (size_t i = 0; i < refs.size(); ++i) {
      image.pages.push_back({g, refs[i].base, refs[i].used, refs[i].cls, std::move(rows[i])});
    }
  }
  return image;
}

Session PageTable::restore(const SessionImage& image) {
  State restored = state_of(image);
  for (int64_t g = 0; g < num_groups(); ++g) {
    const std::string what = fault(restored, g);
    if (!what.empty()) throw Error(concat("image: group=", g, ": ", what));
  }
  const Session session = open(image.budgets, image.priority);
  State& s = sessions_[session.slot];
  s.phase = Phase::kSuspended;
  s.length = restored.length;
  s.mark = restored.mark;
  for (int64_t g = 0; g < num_groups(); ++g) {
    s.groups[g].list = restored.groups[g].list;  // copied: what was set aside for it stays
    s.groups[g].rolled_to = restored.groups[g].rolled_to;
    s.groups[g].positions = std::move(restored.groups[g].positions);
  }
  return session;
}

// Checks what has to hold before a state can be looked at; fault() tells the rest.
PageTable::State PageTable::state_of(const SessionImage& image) const {
  check_budgets(image.budgets);
  TML_CHECK(image.length >= 0 && image.length <= kMaxPosition, "length=", image.length);
  TML_CHECK(image.mark >= -1 && image.mark <= image.length, "mark=", image.mark,
            " length=", image.length);
  TML_CHECK(image.rolled_to.size() == specs_.size(), "rolled_to: groups=", image.rolled_to.size(),
            ", not ", specs_.size());
  State s;
  s.phase = Phase::kSuspended;
  s.length = image.length;
  s.mark = image.mark;
  s.budgets = image.budgets;
  std::vector<std::vector<PageEntry>> entries(specs_.size());
  for (const int64_t rolled_to : image.rolled_to) {
    s.groups.push_back({PageList(0), {}, rolled_to, {}});
  }
  int64_t last_group = 0;
  for (const auto& [g, base, used, cls, positions] : image.pages) {
    TML_CHECK(g >= last_group && g < num_groups(), "group=", g, " after ", last_group);
    const GroupSpec& spec = specs_[g];
    const auto num_positions = static_cast<int64_t>(positions.size());
    TML_CHECK(used > 0 && used <= spec.page_rows, "used=", used, " page_rows=", spec.page_rows);
    TML_CHECK(used == num_positions, "used=", used, " positions=", num_positions);
    TML_CHECK(base >= 0 && base < s.length, "base=", base, " length=", s.length);
    TML_CHECK(base == positions.front(), "base=", base, " position=", positions.front());
    TML_CHECK(static_cast<int>(cls) < kNumClasses, "class=", static_cast<int>(cls));
    TML_CHECK(spec.window == 0 || cls == kUnclassed, "class=", class_name(cls), " in a window");
    TML_CHECK(static_cast<int64_t>(entries[g].size()) < spec.columns, "columns=", spec.columns);
    last_group = g;
    entries[g].push_back({-1, static_cast<int32_t>(used), base, cls});
    if (spec.window > 0) {
      for (int64_t i = 0; i < used; ++i) {
        TML_CHECK(positions[i] == base + i, "position=", positions[i], " in a window, base=", base);
      }
      continue;
    }
    auto& saved = s.groups[g].positions;
    saved.insert(saved.end(), positions.begin(), positions.end());
    saved.resize(entries[g].size() * spec.page_rows);
  }
  for (int64_t g = 0; g < num_groups(); ++g) s.groups[g].list.assign(entries[g]);
  return s;
}

}  // namespace tml
