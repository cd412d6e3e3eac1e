// A session's pages in one layer group: a compact list without order, and two chains through it by
// age, one over all pages and one per class. All functions are O(1), but assign().
//
// remove(1) of [A, B, C] gives [A, C]: the last entry moves into the hole, and the chains follow.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <numeric>
#include <vector>

namespace tml {

enum class PageClass : uint8_t { kAnchor, kText, kAudio, kVideo, kReply };
constexpr int kNumClasses = 5;

struct PageEntry {
  int32_t page;  // -1 while the session is suspended
  int32_t used;  // rows that hold tokens, from the first on
  int64_t base;  // position of the first row
  PageClass cls;
};

class PageList {
 public:
  explicit PageList(int64_t max_entries) { nodes_.reserve(max_entries); }

  int32_t size() const { return nodes_.size(); }
  int32_t count(PageClass cls) const { return counts_[static_cast<int>(cls)]; }
  PageEntry& operator[](int32_t index) { return nodes_[index].entry; }
  const PageEntry& operator[](int32_t index) const { return nodes_[index].entry; }

  // Indices, -1 where there is none.
  int32_t oldest() const { return ends_[0].oldest; }
  int32_t newest() const { return ends_[0].newest; }
  int32_t newer(int32_t index) const { return nodes_[index].links[0].newer; }
  int32_t older(int32_t index) const { return nodes_[index].links[0].older; }
  int32_t oldest(PageClass cls) const { return ends_[chain(1, cls)].oldest; }
  int32_t newest(PageClass cls) const { return ends_[chain(1, cls)].newest; }
  int32_t newer_of_class(int32_t index) const { return nodes_[index].links[1].newer; }
  int32_t older_of_class(int32_t index) const { return nodes_[index].links[1].older; }

  // As the newest; returns its index.
  int32_t push(const PageEntry& entry) {
    nodes_.push_back({entry, {}});
    link(size() - 1);
    return size() - 1;
  }

  // In place of what is there, with these indices; the base tells the age. O(n log n).
  void assign(const std::vector<PageEntry>& entries) {
    nodes_.clear();
    ends_.fill({});
    counts_.fill(0);
    for (const PageEntry& entry : entries) nodes_.push_back({entry, {}});
    std::vector<int32_t> by_age(entries.size());
    std::iota(by_age.begin(), by_age.end(), 0);
    std::stable_sort(by_age.begin(), by_age.end(), [&entries](int32_t a, int32_t b) {
      return entries[a].base < entries[b].base;
    });
    for (const int32_t index : by_age) link(index);
  }

  void remove(int32_t index) {
    --counts_[static_cast<int>(nodes_[index].entry.cls)];
    for (int k = 0; k < 2; ++k) {
      const Link link = nodes_[index].links[k];
      join(k, nodes_[index].entry.cls, link.older, link.newer);
    }
    const int32_t last = size() - 1;
    if (index != last) {
      nodes_[index] = nodes_[last];
      for (int k = 0; k < 2; ++k) {
        const Link link = nodes_[index].links[k];
        join(k, nodes_[index].entry.cls, link.older, index);
        join(k, nodes_[index].entry.cls, index, link.newer);
      }
    }
    nodes_.pop_back();
  }

 private:
  struct Link {
    int32_t older = -1, newer = -1;
  };
  struct Node {
    PageEntry entry;
    std::array<Link, 2> links;  // of all pages, of this one's class
  };
  struct Ends {
    int32_t oldest = -1, newest = -1;
  };

  static int chain(int k, PageClass cls) { return k == 0 ? 0 : 1 + static_cast<int>(cls); }

  // Makes a node without links the newest.
  void link(int32_t index) {
    const PageClass cls = nodes_[index].entry.cls;
    for (int k = 0; k < 2; ++k) {
      Ends& ends = ends_[chain(k, cls)];
      nodes_[index].links[k] = {ends.newest, -1};
      (ends.newest < 0 ? ends.oldest : nodes_[ends.newest].links[k].newer) = index;
      ends.newest = index;
    }
    ++counts_[static_cast<int>(cls)];
  }

  // Makes the two neighbours in a chain; -1 is the chain's end.
  void join(int k, PageClass cls, int32_t older, int32_t newer) {
    Ends& ends = ends_[chain(k, cls)];
    (older < 0 ? ends.oldest : nodes_[older].links[k].newer) = newer;
    (newer < 0 ? ends.newest : nodes_[newer].links[k].older) = older;
  }

  std::vector<Node> nodes_;
  std::array<Ends, 1 + kNumClasses> ends_;
  std::array<int32_t, kNumClasses> counts_{};
};

}  // namespace tml
