// Where a tick's tokens lie: which is what, whose it is, and where its keys' place is noted.
//
// In the first pass over the layers a row's runs, its input blocks and then its first output step,
// stand one behind another, and rows too. Every later output step is a pass of its own, of a token
// for each row. Keys of all passes are noted in one line of columns: those of the first, then those
// of each later step. One row of two tokens of sound in slot 5, with room for three tokens and two
// rows, that takes two output steps:
//   kind = levels levels step   index = 0 1 5   columns: 0 1 2 | 3 -
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <utility>
#include <vector>

#include "common/check.h"

namespace tml {

// As tml_kernels.ops.embed_tokens numbers them.
enum class TokenKind : int32_t { kNothing = 0, kText = 1, kLevels = 2, kEmbedded = 3, kStep = 4 };

template <typename T>
struct Numbers {
  T* data;
  int64_t size;

  T* begin() const { return data; }
  T* end() const { return data + size; }
  T& operator[](int64_t i) const { return data[i]; }
};

// Of a bucket: T tokens of the first pass, S rows, N slots, O output steps, Z = T + (O - 1) * S
// columns. A runs of a row: its input blocks, then its output steps. What `TickInputs` of
// tml_runtime.model says of the names that are there too.
struct TickArrays {
  Numbers<int32_t> kind_T, index_T, slot_S, start_S1;
  Numbers<int64_t> at_S, last_S, length_O_S, said_N, steps_N;
  Numbers<int64_t> tokens_S_A, column_S_A;  // of each run: how many, and where the first is noted
  Numbers<int64_t> position_Z;              // of the token that is noted there, in its session
};

class TickLayout {
 public:
  // kinds: of a row's runs in the first pass, the output step last.
  TickLayout(std::vector<TokenKind> kinds_R, const TickArrays& arrays)
      : kinds_R_(std::move(kinds_R)), a_(arrays) {
    const int64_t rows = a_.slot_S.size, slots = a_.said_N.size;
    TML_CHECK(!kinds_R_.empty() && kinds_R_.back() == TokenKind::kStep, "kinds=", kinds_R_.size());
    TML_CHECK(rows > 0 && a_.length_O_S.size % rows == 0, "rows=", rows,
              " length=", a_.length_O_S.size);
    steps_ = a_.length_O_S.size / rows;
    const int64_t runs = num_runs() + steps_ - 1;
    TML_CHECK(steps_ > 0, "length=", a_.length_O_S.size);
    TML_CHECK(a_.index_T.size == a_.kind_T.size, "index=", a_.index_T.size);
    TML_CHECK(a_.at_S.size == rows && a_.last_S.size == rows && a_.start_S1.size == rows + 1,
              "rows=", rows, " at=", a_.at_S.size, " last=", a_.last_S.size,
              " start=", a_.start_S1.size);
    TML_CHECK(a_.steps_N.size == slots, "steps=", a_.steps_N.size, " slots=", slots);
    TML_CHECK(a_.tokens_S_A.size == rows * runs && a_.column_S_A.size == rows * runs,
              "tokens=", a_.tokens_S_A.size, " columns=", a_.column_S_A.size, " rows=", rows,
              " runs=", runs);
    TML_CHECK(a_.position_Z.size == a_.kind_T.size + (steps_ - 1) * rows,
              "position=", a_.position_Z.size);
  }

  // Rows of these slots, with so many tokens of each run; of text, these ids. Rows and tokens
  // behind them are idle. Error, with nothing changed, for more than there is room for.
  void fill(const std::vector<int64_t>& slots, Numbers<const int64_t> count_S_R,
            const std::vector<int32_t>& ids) {
    const auto num_rows = static_cast<int64_t>(slots.size());
    check(slots, count_S_R, ids);
    std::iota(a_.said_N.begin(), a_.said_N.end(), int64_t{0});
    std::fill(a_.steps_N.begin(), a_.steps_N.end(), int64_t{0});
    std::fill(a_.position_Z.begin(), a_.position_Z.end(), int64_t{0});
    next_token_ = next_text_ = next_levels_ = next_embedded_ = 0;
    for (int64_t row = 0; row < num_rows; ++row) {
      const int64_t slot = slots[row];
      a_.start_S1[row] = static_cast<int32_t>(next_token_);
      fill_row(row, static_cast<int32_t>(slot), count_S_R.data + row * num_runs(), ids);
      a_.slot_S[row] = static_cast<int32_t>(slot);
      a_.at_S[row] = slot;
      a_.last_S[row] = next_token_ - 1;
      a_.said_N[slot] = a_.said_N.size + row;
      a_.steps_N[slot] = steps_;
    }
    const auto idle = [num_rows](auto numbers, auto value) {
      std::fill(numbers.begin() + num_rows, numbers.end(), value);
    };
    idle(a_.slot_S, -1);
    idle(a_.at_S, 0);
    idle(a_.last_S, 0);
    idle(a_.start_S1, static_cast<int32_t>(next_token_));
    std::fill(a_.kind_T.begin() + next_token_, a_.kind_T.end(),
              static_cast<int32_t>(TokenKind::kNothing));
    std::fill(a_.index_T.begin() + next_token_, a_.index_T.end(), int32_t{0});
    num_rows_ = num_rows;
  }

  // After every pass, from the positions that the cache has given the tokens of the last `fill`.
  void set_lengths() {
    const int64_t rows = a_.slot_S.size;
    std::fill(a_.length_O_S.begin(), a_.length_O_S.end(), int64_t{0});
    for (int64_t step = 0; step < steps_; ++step) {
      for (int64_t row = 0; row < num_rows_; ++row) {
        a_.length_O_S[step * rows + row] = a_.position_Z[a_.last_S[row]] + 1 + step;
      }
    }
  }

 private:
  int64_t num_runs() const { return static_cast<int64_t>(kinds_R_.size()); }

  // The last run has all output steps, of which the first pass has one.
  int64_t first_pass(int64_t run, int64_t count) const { return run + 1 < num_runs() ? count : 1; }

  void check(const std::vector<int64_t>& slots, Numbers<const int64_t> count_S_R,
             const std::vector<int32_t>& ids) const {
    const auto num_rows = static_cast<int64_t>(slots.size());
    TML_CHECK(num_rows <= a_.slot_S.size, "slots=", num_rows, " rows=", a_.slot_S.size);
    TML_CHECK(count_S_R.size == num_rows * num_runs(), "counts=", count_S_R.size,
              " slots=", num_rows, " runs=", num_runs());
    for (const int64_t slot : slots) {
      TML_CHECK(slot >= 0 && slot < a_.said_N.size, "slot=", slot, " slots=", a_.said_N.size);
    }
    int64_t tokens = 0, text = 0;
    for (int64_t i = 0; i < count_S_R.size; ++i) {
      const int64_t count = first_pass(i % num_runs(), count_S_R[i]);
      TML_CHECK(count >= 0 && count <= a_.kind_T.size - tokens, "count=", count,
                " before it=", tokens, " tokens=", a_.kind_T.size);
      tokens += count;
      if (kinds_R_[i % num_runs()] == TokenKind::kText) text += count;
    }
    TML_CHECK(text == static_cast<int64_t>(ids.size()), "text=", text, " ids=", ids.size());
  }

  void fill_row(int64_t row, int32_t slot, const int64_t* count_R,
                const std::vector<int32_t>& ids) {
    const int64_t later = steps_ - 1, runs = num_runs() + later;
    int64_t* const tokens_A = a_.tokens_S_A.data + row * runs;
    int64_t* const column_A = a_.column_S_A.data + row * runs;
    for (int64_t run = 0; run < num_runs(); ++run) {
      tokens_A[run] = first_pass(run, count_R[run]);
      column_A[run] = next_token_;
      for (int64_t n = 0; n < tokens_A[run]; ++n, ++next_token_) {
        a_.kind_T[next_token_] = static_cast<int32_t>(kinds_R_[run]);
        a_.index_T[next_token_] = next_index(kinds_R_[run], slot, ids);
      }
    }
    for (int64_t step = 0; step < later; ++step) {
      tokens_A[num_runs() + step] = 1;
      column_A[num_runs() + step] = a_.kind_T.size + step * a_.slot_S.size + row;
    }
  }

  int32_t next_index(TokenKind kind, int32_t slot, const std::vector<int32_t>& ids) {
    switch (kind) {
      case TokenKind::kText:
        return ids[next_text_++];
      case TokenKind::kLevels:
        return next_levels_++;
      case TokenKind::kEmbedded:
        return next_embedded_++;
      default:
        return slot;
    }
  }

  std::vector<TokenKind> kinds_R_;
  TickArrays a_;
  int64_t steps_ = 0, num_rows_ = 0;
  int64_t next_token_ = 0, next_text_ = 0;
  int32_t next_levels_ = 0, next_embedded_ = 0;
};

}  // namespace tml
