// What a page table can refuse, with figures. Each leaves everything as it was.
#pragma once

#include <cstdint>
#include <stdexcept>

#include "../common/check.h"

namespace tml {

class CacheError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// The handle's session is closed, or never was.
struct UnknownSession : CacheError {
  UnknownSession(int64_t slot, int64_t epoch)
      : CacheError(concat("no session has slot=", slot, " epoch=", epoch)),
        slot(slot),
        epoch(epoch) {}
  int64_t slot, epoch;
};

struct OutOfSessions : CacheError {
  explicit OutOfSessions(int64_t max_sessions)
      : CacheError(concat("all slots are taken: max_sessions=", max_sessions)),
        max_sessions(max_sessions) {}
  int64_t max_sessions;
};

// Evictable pages could be freed by roll(), and then be used when the fence has passed.
struct OutOfPages : CacheError {
  OutOfPages(int64_t group, int64_t needed, int64_t free, int64_t evictable)
      : CacheError(
            concat("group ", group, ": needed=", needed, " free=", free, " evictable=", evictable)),
        group(group),
        needed(needed),
        free(free),
        evictable(evictable) {}
  int64_t group, needed, free, evictable;
};

// A session's own limit: what is "anchor" (a budget that no eviction enforces) or "columns".
struct BudgetExceeded : CacheError {
  BudgetExceeded(const char* what, int64_t needed, int64_t limit)
      : CacheError(concat(what, " pages: needed=", needed, " limit=", limit)),
        needed(needed),
        limit(limit) {}
  int64_t needed, limit;
};

// An append that the reservation does not cover; `left` is the most that it does, for this class.
struct ReservationExceeded : CacheError {
  ReservationExceeded(const char* name, int64_t tokens, int64_t left)
      : CacheError(concat("append of ", name, ": tokens=", tokens, " left=", left)),
        tokens(tokens),
        left(left) {}
  int64_t tokens, left;
};

// A rewind so far back that a window needs keys which are gone; `oldest` would be possible.
struct WindowPassed : CacheError {
  WindowPassed(int64_t group, int64_t position, int64_t oldest)
      : CacheError(concat("group ", group, ": rewind to position=", position,
                          ", but the window has rolled: oldest=", oldest)),
        group(group),
        position(position),
        oldest(oldest) {}
  int64_t group, position, oldest;
};

}  // namespace tml
