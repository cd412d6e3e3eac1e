// The page table under the sanitizers, without Python: random verbs, invariants after each. Exits
// with 0, or prints what failed.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <thread>
#include <tuple>
#include <vector>

#include "kv/page_table.h"

namespace {

using tml::PageClass;
using tml::PageTable;

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

constexpr int64_t kNumGroups = 4;
constexpr int64_t kPageRows[kNumGroups] = {4, 4, 4, 3};

PageTable small_table(int64_t lag) {
  return PageTable(
      {{24, 12, 4, 0, 0, 9}, {16, 6, 4, 6, 2, 0}, {20, 8, 4, 1, 0, 0}, {40, 16, 3, 0, 0, 3}}, 3,
      lag);
}

bool same(const tml::SessionImage& a, const tml::SessionImage& b) {
  const auto fields = [](const tml::PageImage& p) {
    return std::tie(p.group, p.base, p.used, p.cls, p.positions);
  };
  return std::tie(a.length, a.mark, a.priority, a.budgets, a.rolled_to) ==
             std::tie(b.length, b.mark, b.priority, b.budgets, b.rolled_to) &&
         std::equal(a.pages.begin(), a.pages.end(), b.pages.begin(), b.pages.end(),
                    [&](const auto& p, const auto& q) { return fields(p) == fields(q); });
}

constexpr tml::Budgets kBudgets = {2, 2, 2, 3, 2};

class Fuzz {
 public:
  Fuzz(unsigned seed, int64_t lag) : table_(small_table(lag)), rng_(seed) {}

  // A random verb; what it refuses must be refused for a reason that it names.
  void step() {
    try {
      switch (rng_() % 18) {
        case 0:
          handles_.push_back(table_.open(kBudgets, below(3)));
          break;
        case 1:
          if (below(2) == 0) table_.close(any());
          break;
        case 2:
        case 3:
        case 4:
          transact(any());
          break;
        case 5:
          table_.tick(++tick_);
          break;
        case 6:
          table_.roll(any(), 0, below(3));
          break;
        case 7:
          table_.mark(any());
          break;
        case 8:
          table_.rewind_to_mark(any());
          break;
        case 9:
          rewind(any());
          break;
        case 10:
          handles_.push_back(table_.fork(any(), 0).first);
          break;
        case 11:
          table_.suspend(any());
          break;
        case 12:
          table_.resume(any());
          break;
        case 13:
          copy_by_image(any());
          break;
        case 14:
          damage_image(any());
          break;
        case 15:
        case 16:
          transact_all();
          break;
        default:
          table_.victim(any());
          drain();
      }
    } catch (const tml::CacheError&) {
      ++refused_;
    } catch (const tml::StateError&) {
      ++refused_;
    }
    table_.check_invariants();
  }

  int64_t refused() const { return refused_; }
  int64_t damaged() const { return damaged_; }

  void close_all() {
    for (const auto handle : handles_) {
      try {
        table_.close(handle);
      } catch (const tml::UnknownSession&) {
      }
    }
    for (int i = 0; i < 2; ++i) table_.tick(++tick_);
    for (const auto& stats : table_.stats()) expect(stats.free == stats.pages - 1, "no page leaks");
  }

 private:
  int64_t below(int64_t n) { return rng_() % n; }

  tml::Session any() {
    if (handles_.empty()) return {0, 0};
    const size_t recent = std::min<size_t>(handles_.size(), 5);
    return handles_[handles_.size() - 1 - below(recent)];
  }

  std::vector<std::tuple<int64_t, int64_t, int64_t>> contents(tml::Session session) const {
    std::vector<std::tuple<int64_t, int64_t, int64_t>> all;
    for (int64_t group = 0; group < kNumGroups; ++group) {
      for (const auto& ref : table_.pages(session, group)) {
        all.emplace_back(ref.page, ref.base, ref.used);
      }
    }
    return all;
  }

  // The rows of one append are those that the pages tell, position by position.
  void append(tml::Session session, PageClass cls, int64_t tokens) {
    std::vector<int64_t> rows(kNumGroups * tokens, -1);
    const int64_t first = table_.append(session, cls, tokens, rows.data(), tokens);
    for (int64_t group = 0; group < kNumGroups; ++group) {
      const auto refs = table_.pages(session, group);
      const auto positions = table_.positions(session, group);
      int64_t found = 0;
      for (size_t i = 0; i < refs.size(); ++i) {
        for (int64_t row = 0; row < refs[i].used; ++row) {
          const int64_t token = positions[i][row] - first;
          if (token < 0) continue;
          ++found;
          expect(rows[group * tokens + token] == refs[i].page * kPageRows[group] + row,
                 "append: the rows");
        }
      }
      expect(found == tokens, "append: every token has a row");
    }
  }

  void transact(tml::Session session) {
    std::vector<tml::Run> runs;
    for (int64_t i = below(5); i > 0; --i) runs.push_back({PageClass(below(5)), below(7)});
    const auto before = contents(session);
    const int64_t length = table_.stats(session).length;
    table_.reserve(session, runs);
    for (const auto& [cls, tokens] : runs) {
      append(session, cls, below(tokens + 1));
      table_.check_invariants();
    }
    expect_throws<tml::ReservationExceeded>(
        [&] { table_.append(session, PageClass::kText, 100, nullptr, 0); },
        "append: more than reserved");
    if (below(4) > 0) return table_.commit(session);
    table_.roll_back(session);
    expect(contents(session) == before, "roll_back: the pages are those before");
    expect(table_.stats(session).length == length, "roll_back: the length is that before");
  }

  // Many sessions at once are as one after the other, which a copy of the table shows.
  void transact_all() {
    std::vector<tml::Session> sessions{any(), any(), any()};
    const std::vector<PageClass> classes{PageClass(below(5)), PageClass(below(5)),
                                         PageClass(below(5))};
    std::vector<int64_t> tokens, columns;
    for (int64_t width = 0; tokens.size() < 9; width += tokens.back()) {
      tokens.push_back(below(5));
      columns.push_back(width);
    }
    const int64_t width = columns.back() + tokens.back();
    PageTable one = table_;
    std::vector<int64_t> rows(kNumGroups * width, -1), positions(width, -1);
    auto one_rows = rows, one_positions = positions;
    const int64_t begun = table_.reserve_all(sessions, classes, tokens.data());
    for (int64_t i = 0; i < begun; ++i) {
      std::vector<tml::Run> runs;
      for (int64_t r = 0; r < 3; ++r) runs.push_back({classes[r], tokens[3 * i + r]});
      one.reserve(sessions[i], runs);
      for (int64_t r = 0; r < 3; ++r) {
        const int64_t column = columns[3 * i + r];
        const int64_t first =
            one.append(sessions[i], classes[r], tokens[3 * i + r], one_rows.data() + column, width);
        for (int64_t t = 0; t < tokens[3 * i + r]; ++t) one_positions[column + t] = first + t;
      }
    }
    sessions.resize(begun);
    table_.append_all(sessions, classes, tokens.data(), columns.data(), rows.data(), width,
                      positions.data());
    expect(rows == one_rows && positions == one_positions, "append_all: as one by one");
    if (below(4) > 0) {
      table_.commit_all(sessions);
      for (const auto session : sessions) one.commit(session);
    } else {
      for (PageTable* table : {&table_, &one}) {
        for (const auto session : sessions) table->roll_back(session);
      }
    }
    expect(table_.lengths() == one.lengths() && table_.dropped() == one.dropped() &&
               table_.work() == one.work() && table_.num_deltas() == one.num_deltas(),
           "many at once: the same books");
    for (const auto session : sessions) {
      expect(same(table_.image(session), one.image(session)), "many at once: the same pages");
      expect(table_.length(session) == table_.stats(session).length, "length");
    }
    if (begun > 0)
      expect(table_.held({sessions[0]}, 0) == table_.stats(sessions[0]).pages[0], "held");
  }

  void rewind(tml::Session session) {
    const int64_t length = table_.stats(session).length;
    const int64_t position = std::max<int64_t>(0, length - below(12));
    table_.rewind(session, position);
    expect(table_.stats(session).length == position, "rewind: to the position");
  }

  void copy_by_image(tml::Session session) {
    const auto image = table_.image(session);
    handles_.push_back(table_.restore(image));
    expect(same(table_.image(handles_.back()), image), "restore: the image again");
  }

  // One number of an image is changed: it is refused, or makes a session like any other.
  void damage_image(tml::Session session) {
    auto image = table_.image(session);
    std::vector<int64_t*> numbers = {&image.length, &image.mark};
    for (int64_t& budget : image.budgets) numbers.push_back(&budget);
    for (int64_t& rolled_to : image.rolled_to) numbers.push_back(&rolled_to);
    for (auto& page : image.pages) {
      numbers.insert(numbers.end(), {&page.group, &page.base, &page.used});
      for (int64_t& position : page.positions) numbers.push_back(&position);
    }
    constexpr int64_t kMin = std::numeric_limits<int64_t>::min();
    constexpr int64_t kMax = std::numeric_limits<int64_t>::max();
    int64_t& number = *numbers[below(numbers.size())];
    const int64_t near = std::clamp<int64_t>(number, -1, kMax - 4);
    const int64_t values[] = {kMin, -1, 0, near - 1, near + 1, near + 4, kMax};
    number = values[below(std::size(values))];
    try {
      handles_.push_back(table_.restore(image));
      expect(same(table_.image(handles_.back()), image), "restore: the changed image");
    } catch (const tml::Error&) {
      ++damaged_;
    }
  }

  void drain() {
    std::vector<int64_t> deltas(table_.num_deltas() * PageTable::kDeltaWords);
    table_.take_deltas(deltas.data());
    expect(table_.num_deltas() == 0, "deltas: taken");
  }

  PageTable table_;
  std::minstd_rand rng_;
  std::vector<tml::Session> handles_;
  int64_t tick_ = 0, refused_ = 0, damaged_ = 0;
};

void fuzz(unsigned seed, int64_t lag) {
  Fuzz fuzz(seed, lag);
  for (int i = 0; i < 10'000; ++i) fuzz.step();
  expect(fuzz.refused() > 100, "fuzz: reaches the limits");
  expect(fuzz.damaged() > 100, "fuzz: images are refused");
  fuzz.close_all();
}

void free_at_once() {
  PageTable table = small_table(0);
  for (int i = 0; i < 100; ++i) {
    const auto session = table.open(kBudgets, 0);
    std::vector<int64_t> rows(kNumGroups * 8);
    table.reserve(session, {{PageClass::kText, 8}});
    table.append(session, PageClass::kText, 8, rows.data(), 8);
    table.commit(session);
    table.close(session);
    for (const auto& stats : table.stats()) {
      expect(stats.free == stats.pages - 1 && stats.waiting == 0, "lag 0: free without a tick");
    }
  }
}

void refusals() {
  PageTable table = small_table(2);
  const auto session = table.open(kBudgets, 0);
  expect_throws<tml::UnknownSession>([&] { table.mark({session.slot, session.epoch + 1}); },
                                     "an epoch that never was");
  expect_throws<tml::UnknownSession>([&] { table.mark({3, 1}); }, "a slot that is not there");
  expect_throws<tml::StateError>([&] { table.commit(session); }, "commit without reserve");
  expect_throws<tml::BudgetExceeded>([&] { table.reserve(session, {{PageClass::kAnchor, 9}}); },
                                     "more anchors than the budget");
  expect_throws<tml::BudgetExceeded>([&] { table.reserve(session, {{PageClass::kText, 25}}); },
                                     "more pages than columns");
  expect_throws<tml::Error>([&] { table.reserve(session, {{PageClass::kText, -1}}); }, "tokens=-1");
  expect_throws<tml::StateError>([&] { table.commit_all({session}); }, "commit_all likewise");
  const int64_t tokens = 1, column = 1;
  int64_t row = 0, position = 0;
  expect_throws<tml::Error>(
      [&] {
        table.append_all({session}, {PageClass::kText}, &tokens, &column, &row, 1, &position);
      },
      "a column beyond the rows");
  expect_throws<tml::Error>([&] { table.rewind(session, 1); }, "a position to come");
  expect_throws<tml::Error>([&] { table.tick(0); }, "a tick that has been");
  expect(table.num_deltas() == 0 && table.work() == 0, "refusals change nothing");
}

}  // namespace

int main() {
  refusals();
  free_at_once();
  // Tables share nothing, so threads may have one each.
  std::thread other([] { fuzz(1, 2); });
  fuzz(2, 0);
  other.join();
  std::puts("ok");
}
