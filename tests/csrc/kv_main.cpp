// The page table under the sanitizers, without Python: random verbs, invariants after each. Exits
// with 0, or prints what failed.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
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

PageTable small_table() {
  return PageTable({{24, 12, 4, 0, 0}, {16, 6, 4, 6, 2}, {20, 8, 4, 1, 0}}, 3, 2);
}

constexpr tml::Budgets kBudgets = {2, 2, 2, 3, 2};

class Fuzz {
 public:
  explicit Fuzz(unsigned seed) : rng_(seed) {}

  // A random verb; what it refuses must be refused for a reason that it names.
  void step() {
    try {
      switch (rng_() % 14) {
        case 0:
          handles_.push_back(table_.open(kBudgets, below(3)));
          break;
        case 1:
          if (below(4) == 0) table_.close(any());
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
    for (int64_t group = 0; group < 3; ++group) {
      for (const auto& ref : table_.pages(session, group)) {
        all.emplace_back(ref.page, ref.base, ref.used);
      }
    }
    return all;
  }

  void transact(tml::Session session) {
    std::vector<tml::Run> runs;
    for (int64_t i = below(5); i > 0; --i) runs.push_back({PageClass(below(5)), below(7)});
    const auto before = contents(session);
    const int64_t length = table_.stats(session).length;
    table_.reserve(session, runs);
    for (const auto& [cls, tokens] : runs) {
      table_.append(session, cls, below(tokens + 1));
      table_.check_invariants();
    }
    expect_throws<tml::ReservationExceeded>([&] { table_.append(session, PageClass::kText, 100); },
                                            "append: more than reserved");
    if (below(2) == 0) return table_.commit(session);
    table_.roll_back(session);
    expect(contents(session) == before, "roll_back: the pages are those before");
    expect(table_.stats(session).length == length, "roll_back: the length is that before");
  }

  void rewind(tml::Session session) {
    const int64_t length = table_.stats(session).length;
    const int64_t position = std::max<int64_t>(0, length - below(12));
    table_.rewind(session, position);
    expect(table_.stats(session).length == position, "rewind: to the position");
  }

  void drain() {
    std::vector<int64_t> deltas(table_.num_deltas() * PageTable::kDeltaWords);
    table_.take_deltas(deltas.data());
    expect(table_.num_deltas() == 0, "deltas: taken");
  }

  PageTable table_ = small_table();
  std::minstd_rand rng_;
  std::vector<tml::Session> handles_;
  int64_t tick_ = 0, refused_ = 0;
};

void fuzz(unsigned seed) {
  Fuzz fuzz(seed);
  for (int i = 0; i < 10'000; ++i) fuzz.step();
  expect(fuzz.refused() > 100, "fuzz: reaches the limits");
  fuzz.close_all();
}

void refusals() {
  PageTable table = small_table();
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
  expect_throws<tml::Error>([&] { table.rewind(session, 1); }, "a position to come");
  expect_throws<tml::Error>([&] { table.tick(0); }, "a tick that has been");
  expect(table.num_deltas() == 0 && table.work() == 0, "refusals change nothing");
}

}  // namespace

int main() {
  refusals();
  // Tables share nothing, so threads may have one each.
  std::thread other([] { fuzz(1); });
  fuzz(2);
  other.join();
  std::puts("ok");
}
