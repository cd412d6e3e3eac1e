// The pages of one layer group: free, waiting behind the tick fence, or held. No page is searched
// for: every function but advance() is O(1), and that is O(pages it frees).
//
// A page freed in tick n may be handed out again from tick n + lag on, with lag = 0 at once: until
// then the device may still read it. Page 0 is the zero page, which padding points to, and is never
// handed out.
#pragma once

#include <cstdint>
#include <vector>

#include "../common/check.h"

namespace tml {

class PagePool {
 public:
  PagePool(int64_t num_pages, int64_t lag)
      : lag_(lag), refs_(num_pages, 0), waiting_(num_pages, Waiting{}) {
    free_.reserve(num_pages);
    for (int64_t page = num_pages - 1; page > 0; --page) free_.push_back(page);
  }

  int64_t num_pages() const { return refs_.size(); }
  int64_t num_free() const { return free_.size(); }
  int64_t num_waiting() const { return num_waiting_; }
  int32_t refs(int32_t page) const { return refs_[page]; }

  // The caller has seen that num_free() > 0.
  int32_t take() {
    const int32_t page = free_.back();
    free_.pop_back();
    refs_[page] = 1;
    return page;
  }

  void share(int32_t page) { ++refs_[page]; }

  // A page that was taken and never written.
  void give_back(int32_t page) {
    refs_[page] = 0;
    free_.push_back(page);
  }

  // One holder less; true when it was the last.
  bool release(int32_t page, int64_t tick) {
    if (--refs_[page] > 0) return false;
    if (lag_ == 0) {
      free_.push_back(page);
      return true;
    }
    waiting_[(first_ + num_waiting_++) % num_pages()] = {page, tick};
    return true;
  }

  void advance(int64_t tick) {
    while (num_waiting_ > 0 && waiting_[first_].tick <= tick - lag_) {
      free_.push_back(waiting_[first_].page);
      first_ = (first_ + 1) % num_pages();
      --num_waiting_;
    }
  }

  // What is neither held nor lost, each page once; for checking.
  std::vector<int32_t> idle_pages() const {
    std::vector<int32_t> pages = free_;
    for (int64_t i = 0; i < num_waiting_; ++i) {
      pages.push_back(waiting_[(first_ + i) % num_pages()].page);
    }
    return pages;
  }

 private:
  struct Waiting {
    int32_t page;
    int64_t tick;
  };

  int64_t lag_;
  std::vector<int32_t> free_;  // the last is handed out first
  std::vector<int32_t> refs_;
  std::vector<Waiting> waiting_;  // a ring, in the order of freeing
  int64_t first_ = 0, num_waiting_ = 0;
};

}  // namespace tml
