// A bounded, lock-free queue of byte messages between one producer and one consumer thread.
//
// A message is stored as its length (4 bytes) and its bytes, wrapping around the end of the buffer,
// and becomes visible whole. Neither side ever waits: a push that does not fit is dropped and
// counted. Example: capacity 16 holds "abcde" (9 bytes) and "xyz" (7 bytes), and then is full.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>

#include "../common/check.h"

namespace tml {

class Ring {
 public:
  static constexpr size_t kHeader = sizeof(uint32_t);
  static constexpr size_t kMinCapacity = 16;
  static constexpr size_t kMaxCapacity = size_t{1} << 31;  // a length fits the header

  // Holds at least `capacity` bytes: it is rounded up to a power of two.
  explicit Ring(size_t capacity) {
    TML_CHECK(capacity > 0 && capacity <= kMaxCapacity, "capacity=", capacity);
    size_t rounded = kMinCapacity;
    while (rounded < capacity) rounded *= 2;
    mask_ = rounded - 1;
    bytes_ = std::make_unique<unsigned char[]>(rounded);
  }

  size_t capacity() const { return mask_ + 1; }
  size_t max_message() const { return capacity() - kHeader; }

  struct Part {
    const void* data;
    size_t size;
  };

  // Producer. False when there is no room now; a message that would never fit is an error.
  bool push(const void* data, size_t size) {
    const Part part{data, size};
    return push(&part, 1);
  }

  // One message of several parts, end to end.
  bool push(const Part* parts, size_t num_parts) {
    size_t size = 0;
    for (size_t i = 0; i < num_parts; ++i) size += parts[i].size;
    TML_CHECK(size <= max_message(), "size=", size, " max_message=", max_message());
    const uint64_t tail = producer_.tail.load(std::memory_order_relaxed);
    const uint64_t end = tail + kHeader + size;
    if (end - producer_.seen_head > capacity()) {
      producer_.seen_head = consumer_.head.load(std::memory_order_acquire);
      if (end - producer_.seen_head > capacity()) {
        add(producer_.dropped, 1);
        return false;
      }
    }
    const uint32_t header = static_cast<uint32_t>(size);
    write(tail, &header, kHeader);
    uint64_t at = tail + kHeader;
    for (size_t i = 0; i < num_parts; at += parts[i++].size) {
      write(at, parts[i].data, parts[i].size);
    }
    add(producer_.pushed, 1);
    producer_.tail.store(end, std::memory_order_release);
    return true;
  }

  // Consumer. Size of the oldest message; nothing when the ring is empty.
  std::optional<size_t> front_size() {
    const uint64_t head = consumer_.head.load(std::memory_order_relaxed);
    if (consumer_.seen_tail == head) {
      consumer_.seen_tail = producer_.tail.load(std::memory_order_acquire);
      if (consumer_.seen_tail == head) return std::nullopt;
    }
    uint32_t header;
    read(head, &header, kHeader);
    return header;
  }

  // Consumer. Takes the oldest message, whose size front_size() gave, into `data`.
  void pop(void* data, size_t size) {
    const uint64_t head = consumer_.head.load(std::memory_order_relaxed);
    read(head + kHeader, data, size);
    add(consumer_.popped, 1);
    consumer_.head.store(head + kHeader + size, std::memory_order_release);
  }

  // Any thread. Exact on either side's own thread while the other side is still.
  size_t size() const {
    const uint64_t popped = consumer_.popped.load(std::memory_order_acquire);
    return producer_.pushed.load(std::memory_order_acquire) - popped;
  }
  uint64_t dropped() const { return producer_.dropped.load(std::memory_order_relaxed); }

 private:
  static constexpr size_t kCacheLine = 64;

  // The only writer of `counter` adds to it: a plain store is enough.
  static void add(std::atomic<uint64_t>& counter, uint64_t amount) {
    counter.store(counter.load(std::memory_order_relaxed) + amount, std::memory_order_release);
  }

  void write(uint64_t at, const void* data, size_t size) {
    if (size == 0) return;
    const size_t offset = at & mask_;
    const size_t first = std::min(size, capacity() - offset);
    std::memcpy(&bytes_[offset], data, first);
    std::memcpy(&bytes_[0], static_cast<const unsigned char*>(data) + first, size - first);
  }

  void read(uint64_t at, void* data, size_t size) const {
    if (size == 0) return;
    const size_t offset = at & mask_;
    const size_t first = std::min(size, capacity() - offset);
    std::memcpy(data, &bytes_[offset], first);
    std::memcpy(static_cast<unsigned char*>(data) + first, &bytes_[0], size - first);
  }

  size_t mask_;
  std::unique_ptr<unsigned char[]> bytes_;

  // Positions count bytes since the beginning and never wrap; each side keeps the other's last
  // seen position, so that it touches the other's cache line only when that one is used up.
  struct alignas(kCacheLine) {
    std::atomic<uint64_t> tail{0}, pushed{0}, dropped{0};
    uint64_t seen_head = 0;
  } producer_;
  struct alignas(kCacheLine) {
    std::atomic<uint64_t> head{0}, popped{0};
    uint64_t seen_tail = 0;
  } consumer_;
};

}  // namespace tml
