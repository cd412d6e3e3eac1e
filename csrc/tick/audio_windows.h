// One session's samples by media time: row w % H holds window w until it is taken. For one thread.
//
// Where pieces overlap, the one written last wins. With windows of 4 samples, 6 samples written at
// sample 2 fill window 0 to its end and all of window 1; taking window 0 then finds 2 missing, and
// the same 6 written again lose the 2 that are in a closed window.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../common/check.h"
#include "ring.h"

namespace tml {

class AudioWindows {
 public:
  AudioWindows(int64_t num_windows, int64_t num_samples)
      : num_windows_(num_windows), num_samples_(num_samples) {
    TML_CHECK(num_windows > 0 && num_windows < kMaxSize, "num_windows=", num_windows);
    TML_CHECK(num_samples > 0 && num_samples < kMaxSize, "num_samples=", num_samples);
    pcm_H_N_.resize(num_windows * num_samples);
    have_H_N_.resize(num_windows * num_samples);
  }

  int64_t num_samples() const { return num_samples_; }

  // Closes the windows before `window` untaken; returns how many samples that drops.
  int64_t forget_before(int64_t window) {
    TML_CHECK(window < kMaxWindow, "window=", window);
    int64_t dropped = 0;
    for (int64_t w = oldest_; w < std::min(window, oldest_ + num_windows_); ++w) {
      dropped += num_written(w);
      clear(w);
    }
    oldest_ = std::max(oldest_, window);
    return dropped;
  }

  // Puts samples at sample `start`; returns how many of them fall in a closed window.
  int64_t write(int64_t start, const void* pcm, int64_t count) {
    const int64_t first = oldest_ * num_samples_, limit = first + num_windows_ * num_samples_;
    TML_CHECK(start <= limit, "start=", start, " end of the windows=", limit);
    const int64_t end = start + count;
    TML_CHECK(count >= 0 && end <= limit, "start=", start, " samples=", count,
              " end of the windows=", limit);
    int64_t at = std::min(end, std::max(start, first));
    const int64_t dropped = at - start;
    while (at < end) {
      const int64_t window = at / num_samples_, offset = at % num_samples_;
      const int64_t size = std::min(end - at, num_samples_ - offset);
      const int64_t to = row(window) + offset;
      std::memcpy(&pcm_H_N_[to], static_cast<const char*>(pcm) + (at - start) * kSampleBytes,
                  size * kSampleBytes);
      std::memset(&have_H_N_[to], 1, size);
      at += size;
    }
    return dropped;
  }

  // Writes the pieces that wait in a ring, at most `max_pieces`: each is its first sample, int64,
  // and then its samples. Returns how many samples fall in a closed window.
  int64_t drain(Ring& ring, int64_t max_pieces) {
    int64_t dropped = 0;
    for (int64_t i = 0; i < max_pieces; ++i) {
      const auto size = ring.front_size();
      if (!size) break;
      if (piece_.size() < *size) piece_.resize(*size);
      ring.pop(piece_.data(), *size);
      int64_t start;
      TML_CHECK(*size >= sizeof(start) && (*size - sizeof(start)) % kSampleBytes == 0,
                "piece: bytes=", *size);
      std::memcpy(&start, piece_.data(), sizeof(start));
      dropped += write(start, piece_.data() + sizeof(start),
                       static_cast<int64_t>((*size - sizeof(start)) / kSampleBytes));
    }
    return dropped;
  }

  // Copies the oldest window out and closes it; have[i] is 1 where somebody wrote sample i, and the
  // others are 0. Returns how many those are.
  int64_t take(float* pcm_N, uint8_t* have_N) {
    const int64_t missing = num_samples_ - num_written(oldest_);
    std::memcpy(pcm_N, &pcm_H_N_[row(oldest_)], num_samples_ * kSampleBytes);
    std::memcpy(have_N, &have_H_N_[row(oldest_)], num_samples_);
    clear(oldest_++);
    return missing;
  }

 private:
  static constexpr int64_t kMaxSize = int64_t{1} << 24;    // products stay in int64
  static constexpr int64_t kMaxWindow = int64_t{1} << 38;  // likewise
  static constexpr int64_t kSampleBytes = sizeof(float);

  int64_t row(int64_t window) const { return window % num_windows_ * num_samples_; }

  int64_t num_written(int64_t window) const {
    const auto first = have_H_N_.begin() + row(window);
    int64_t count = 0;
    for (int64_t i = 0; i < num_samples_; ++i) count += first[i];
    return count;
  }

  void clear(int64_t window) {
    std::fill_n(pcm_H_N_.begin() + row(window), num_samples_, 0.0f);
    std::fill_n(have_H_N_.begin() + row(window), num_samples_, uint8_t{0});
  }

  int64_t num_windows_, num_samples_, oldest_ = 0;
  std::vector<float> pcm_H_N_;
  std::vector<uint8_t> have_H_N_;
  std::vector<unsigned char> piece_;  // as large as the largest piece so far
};

}  // namespace tml
