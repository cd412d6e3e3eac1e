// For bind_core.cpp: page table verbs that read or write the caller's arrays.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <initializer_list>
#include <string>
#include <vector>

#include "bind_array.h"
#include "kv/page_table.h"

namespace tml::bind {

using Int64Array = Array<int64_t>;

inline Session session_of(const py::handle& handle) {
  TML_CHECK(PyTuple_Check(handle.ptr()) && PyTuple_GET_SIZE(handle.ptr()) == 2,
            "session: expected one that open() or fork() returned, got ",
            Py_TYPE(handle.ptr())->tp_name);
  return {py::handle(PyTuple_GET_ITEM(handle.ptr(), 0)).cast<int64_t>(),
          py::handle(PyTuple_GET_ITEM(handle.ptr(), 1)).cast<int64_t>()};
}

inline std::vector<Session> sessions_of(const py::sequence& handles) {
  std::vector<Session> sessions;
  sessions.reserve(handles.size());
  for (const py::handle& handle : handles) sessions.push_back(session_of(handle));
  return sessions;
}

// `rows` is [groups, T].
inline Int64Array rows_of(const PageTable& table, const py::buffer& rows, bool writable = true) {
  Int64Array array(rows, "rows", writable, 2, "[groups, T]");
  TML_CHECK(array.size(0) == table.num_groups(), "rows: groups=", array.size(0), ", not ",
            table.num_groups());
  return array;
}

// `array` is [S, R]: a number for each run of each session.
inline Int64Array runs_of(const py::buffer& array, const char* name,
                          const std::vector<Session>& sessions_S,
                          const std::vector<PageClass>& classes_R) {
  Int64Array runs(array, name, false, 2, "[S, R]");
  TML_CHECK(runs.size(0) == static_cast<int64_t>(sessions_S.size()), name, ": S=", runs.size(0),
            " sessions=", sessions_S.size());
  TML_CHECK(runs.size(1) == static_cast<int64_t>(classes_R.size()), name, ": R=", runs.size(1),
            " classes=", classes_R.size());
  return runs;
}

inline int64_t append(PageTable& table, const py::tuple& session, PageClass cls, int64_t tokens,
                      const py::buffer& rows, int64_t column) {
  const Int64Array array = rows_of(table, rows);
  const int64_t width = array.size(1);
  TML_CHECK(column >= 0 && column <= width, "column=", column, " rows: T=", width);
  TML_CHECK(tokens <= width - column, "tokens=", tokens, " column=", column, " rows: T=", width);
  return table.append(session_of(session), cls, tokens, array.data() + column, width);
}

inline int64_t reserve_all(PageTable& table, const py::sequence& sessions,
                           const std::vector<PageClass>& classes_R, const py::buffer& tokens) {
  const std::vector<Session> sessions_S = sessions_of(sessions);
  const Int64Array tokens_S_R = runs_of(tokens, "tokens", sessions_S, classes_R);
  return table.reserve_all(sessions_S, classes_R, tokens_S_R.data());
}

inline void append_all(PageTable& table, const py::sequence& sessions,
                       const std::vector<PageClass>& classes_R, const py::buffer& tokens,
                       const py::buffer& columns, const py::buffer& rows,
                       const py::buffer& positions) {
  const std::vector<Session> sessions_S = sessions_of(sessions);
  const Int64Array tokens_S_R = runs_of(tokens, "tokens", sessions_S, classes_R);
  const Int64Array column_S_R = runs_of(columns, "columns", sessions_S, classes_R);
  const Int64Array row_K_T = rows_of(table, rows),
                   position_T(positions, "positions", true, 1, "[T]");
  TML_CHECK(position_T.size(0) == row_K_T.size(1), "positions: T=", position_T.size(0),
            " rows: T=", row_K_T.size(1));
  table.append_all(sessions_S, classes_R, tokens_S_R.data(), column_S_R.data(), row_K_T.data(),
                   row_K_T.size(1), position_T.data());
}

inline void place(const PageTable& table, const py::buffer& rows, const py::buffer& positions,
                  const py::buffer& placed_rows, const py::buffer& placed_positions) {
  const Int64Array row_K_T = rows_of(table, rows, false),
                   position_T(positions, "positions", false, 1, "[T]");
  const Int64Array row_X(placed_rows, "placed_rows", true, 1, "[X]"),
      position_X(placed_positions, "placed_positions", true, 1, "[X]");
  const int64_t num_tokens = row_K_T.size(1), num_placed = num_tokens * table.num_placed();
  TML_CHECK(position_T.size(0) == num_tokens, "positions: T=", position_T.size(0),
            " rows: T=", num_tokens);
  TML_CHECK(row_X.size(0) == num_placed && position_X.size(0) == num_placed,
            "placed_rows: X=", row_X.size(0), " placed_positions: X=", position_X.size(0), ", not ",
            num_placed);
  table.place(row_K_T.data(), position_T.data(), num_tokens, row_X.data(), position_X.data());
}

// The changes, and then rows that are none, to the end of `out`.
inline int64_t take_deltas(PageTable& table, const py::buffer& out) {
  const Int64Array delta_U_4(out, "out", true);
  const int64_t num_deltas = table.num_deltas(), size = delta_U_4.size();
  TML_CHECK(size >= num_deltas * PageTable::kDeltaWords, "out: size=", size,
            " num_deltas=", num_deltas);
  table.take_deltas(delta_U_4.data());
  for (int64_t i = num_deltas * PageTable::kDeltaWords; i < size; ++i) {
    delta_U_4.data()[i] = i % PageTable::kDeltaWords == 0 ? -1 : 0;
  }
  return num_deltas;
}

}  // namespace tml::bind
