// tml_kernels._core: host code. Always built.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <initializer_list>
#include <map>
#include <optional>
#include <utility>
#include <vector>

#include "bind_rows.h"
#include "kv/page_table.h"

namespace py = pybind11;

namespace {

using tml::bind::session_of;
using tml::bind::sessions_of;

constexpr int64_t kDefaultSpan = 2048;

py::dict build_info() {
  py::dict info;
  info["compiler"] = TML_COMPILER;
  info["cxx_standard"] = __cplusplus;
#ifdef NDEBUG
  info["build_type"] = "release";
#else
  info["build_type"] = "debug";
#endif
  info["flags"] = TML_FLAGS;
#ifdef TML_CUDA_ARCHS
  info["cuda_archs"] = py::str(TML_CUDA_ARCHS).attr("split")(";");
#else
  info["cuda_archs"] = py::none();
#endif
  return info;
}

using Fields = std::initializer_list<std::pair<const char*, int64_t>>;

void raise(const char* type_name, const std::exception& error, Fields fields) {
  const py::object type = py::module_::import("tml_kernels._core").attr(type_name);
  const py::object value = type(error.what());
  for (const auto& [name, field] : fields) value.attr(name) = field;
  PyErr_SetObject(type.ptr(), value.ptr());
}

void translate(std::exception_ptr thrown) {
  try {
    if (thrown) std::rethrow_exception(thrown);
  } catch (const tml::UnknownSession& e) {
    raise("UnknownSession", e, {{"slot", e.slot}, {"epoch", e.epoch}});
  } catch (const tml::OutOfSessions& e) {
    raise("OutOfSessions", e, {{"max_sessions", e.max_sessions}});
  } catch (const tml::OutOfPages& e) {
    raise("OutOfPages", e,
          {{"group", e.group}, {"needed", e.needed}, {"free", e.free}, {"evictable", e.evictable}});
  } catch (const tml::BudgetExceeded& e) {
    raise("BudgetExceeded", e, {{"needed", e.needed}, {"limit", e.limit}});
  } catch (const tml::ReservationExceeded& e) {
    raise("ReservationExceeded", e, {{"tokens", e.tokens}, {"left", e.left}});
  } catch (const tml::WindowPassed& e) {
    raise("WindowPassed", e, {{"group", e.group}, {"position", e.position}, {"oldest", e.oldest}});
  }
}

void bind_errors(py::module_& m) {
  const auto define = [&m](const char* name, py::handle base) {
    const std::string full_name = std::string("tml_kernels._core.") + name;
    PyObject* type = PyErr_NewException(full_name.c_str(), base.ptr(), nullptr);
    if (type == nullptr) throw py::error_already_set();
    m.attr(name) = py::reinterpret_steal<py::object>(type);
  };
  define("CacheError", PyExc_RuntimeError);
  for (const char* name : {"UnknownSession", "OutOfSessions", "OutOfPages", "BudgetExceeded",
                           "ReservationExceeded", "WindowPassed"}) {
    define(name, m.attr("CacheError"));
  }
  py::register_local_exception_translator(&translate);
}

// A tuple subclass, so that results unpack and print.
class NamedTuple {
 public:
  NamedTuple(py::module_& m, const char* name, const char* fields)
      : type_(py::module_::import("collections")
                  .attr("namedtuple")(name, fields, py::arg("module") = m.attr("__name__"))) {
    m.attr(name) = type_;
  }

  template <typename... Values>
  py::object operator()(Values&&... values) const {
    return type_(std::forward<Values>(values)...);
  }

 private:
  py::object type_;
};

struct Tuples {
  explicit Tuples(py::module_& m)
      : session(m, "Session", "slot epoch"),
        copy(m, "CopyCommand", "group source target rows"),
        page(m, "PageRef", "group page base used page_class"),
        page_image(m, "PageImage", "group base used page_class positions"),
        session_image(m, "SessionImage", "length mark priority budgets rolled_to pages"),
        group_stats(m, "GroupStats", "pages free waiting reserved held shared"),
        session_stats(m, "SessionStats", "length priority in_transaction suspended pages") {}

  py::list copies(const std::vector<tml::CopyCommand>& commands) const {
    py::list list;
    for (const auto& c : commands) list.append(copy(c.group, c.from, c.to, c.rows));
    return list;
  }
  py::list pages(const std::vector<tml::PageRef>& refs) const {
    py::list list;
    for (const auto& r : refs) list.append(page(r.group, r.page, r.base, r.used, r.cls));
    return list;
  }
  py::object image(const tml::SessionImage& image) const {
    py::list pages;
    for (const auto& p : image.pages) {
      pages.append(page_image(p.group, p.base, p.used, static_cast<int>(p.cls), p.positions));
    }
    const auto mark = image.mark < 0 ? std::nullopt : std::optional(image.mark);
    return session_image(image.length, mark, image.priority, image.budgets, image.rolled_to, pages);
  }

  NamedTuple session, copy, page, page_image, session_image, group_stats, session_stats;
};

// Everything that takes a session goes through this.
template <typename Result, typename Self, typename... Args>
auto on_session(Result (Self::*verb)(tml::Session, Args...)) {
  return [verb](tml::PageTable& self, const py::tuple& session, Args... args) {
    return (self.*verb)(session_of(session), std::forward<Args>(args)...);
  };
}

template <typename Result, typename... Args>
auto on_session(Result (tml::PageTable::*verb)(tml::Session, Args...) const) {
  return [verb](const tml::PageTable& self, const py::tuple& session, Args... args) {
    return (self.*verb)(session_of(session), std::forward<Args>(args)...);
  };
}

tml::Budgets budgets_of(const std::map<tml::PageClass, int64_t>& budgets) {
  TML_CHECK(budgets.size() == tml::kNumClasses, "budgets: expected one of each class, got ",
            budgets.size());
  tml::Budgets array{};
  for (const auto& [cls, pages] : budgets) {
    TML_CHECK(static_cast<int>(cls) < tml::kNumClasses, "class=", static_cast<int>(cls));
    array[static_cast<int>(cls)] = pages;
  }
  return array;
}

// Images come from files: whatever is in there instead is a ValueError.
int64_t int_of(const py::handle& value, const char* name) {
  TML_CHECK(PyLong_CheckExact(value.ptr()), name, ": expected an int, got ",
            Py_TYPE(value.ptr())->tp_name);
  int overflow = 0;
  const int64_t number = PyLong_AsLongLongAndOverflow(value.ptr(), &overflow);
  TML_CHECK(overflow == 0, name, " does not fit into int64");
  return number;
}

py::sequence items_of(const py::handle& value, const char* name) {
  TML_CHECK(PyTuple_Check(value.ptr()) || PyList_Check(value.ptr()), name,
            ": expected a list or a tuple, got ", Py_TYPE(value.ptr())->tp_name);
  return py::reinterpret_borrow<py::sequence>(value);
}

py::sequence fields_of(const py::handle& value, const char* name, size_t count) {
  const py::sequence fields = items_of(value, name);
  TML_CHECK(fields.size() == count, name, ": expected ", count, " values, got ", fields.size());
  return fields;
}

std::vector<int64_t> ints_of(const py::handle& value, const char* name) {
  std::vector<int64_t> ints;
  for (const py::handle& item : items_of(value, name)) ints.push_back(int_of(item, name));
  return ints;
}

tml::SessionImage image_of(const py::handle& value) {
  const py::sequence fields = fields_of(value, "image", 6);
  tml::SessionImage image{
      int_of(fields[0], "length"), -1, int_of(fields[2], "priority"), {}, {}, {}};
  if (!fields[1].is_none()) {
    image.mark = int_of(fields[1], "mark");
    TML_CHECK(image.mark >= 0, "mark=", image.mark);
  }
  const auto budgets = ints_of(fields_of(fields[3], "budgets", tml::kNumClasses), "budgets");
  std::copy(budgets.begin(), budgets.end(), image.budgets.begin());
  image.rolled_to = ints_of(fields[4], "rolled_to");
  for (const py::handle& item : items_of(fields[5], "pages")) {
    const py::sequence page = fields_of(item, "page", 5);
    const int64_t cls = int_of(page[3], "page_class");
    TML_CHECK(cls >= 0 && cls < tml::kNumClasses, "page_class=", cls);
    image.pages.push_back({int_of(page[0], "group"), int_of(page[1], "base"),
                           int_of(page[2], "used"), static_cast<tml::PageClass>(cls),
                           ints_of(page[4], "positions")});
  }
  return image;
}

void bind_kv_types(py::module_& m) {
  py::enum_<tml::PageClass>(m, "PageClass")
      .value("ANCHOR", tml::PageClass::kAnchor)
      .value("TEXT", tml::PageClass::kText)
      .value("AUDIO", tml::PageClass::kAudio)
      .value("VIDEO", tml::PageClass::kVideo)
      .value("REPLY", tml::PageClass::kReply);
  py::class_<tml::GroupSpec>(m, "LayerGroup")
      .def(
          py::init([](int64_t pages, int64_t columns, int64_t page_rows,
                      std::optional<int64_t> window, int64_t history, std::optional<int64_t> span) {
            TML_CHECK(!window || *window > 0, "window=", *window);
            TML_CHECK(!window || !span, "span=", *span, " window=", *window);
            return tml::GroupSpec{pages,     columns,
                                  page_rows, window.value_or(0),
                                  history,   span.value_or(window ? 0 : kDefaultSpan)};
          }),
          py::kw_only(), py::arg("pages"), py::arg("columns"), py::arg("page_rows") = 64,
          py::arg("window") = py::none(), py::arg("history") = 0, py::arg("span") = py::none())
      .def_readonly("pages", &tml::GroupSpec::pages)
      .def_readonly("columns", &tml::GroupSpec::columns)
      .def_readonly("page_rows", &tml::GroupSpec::page_rows)
      .def_property_readonly("window",
                             [](const tml::GroupSpec& spec) {
                               return spec.window > 0 ? std::optional(spec.window) : std::nullopt;
                             })
      .def_readonly("history", &tml::GroupSpec::history)
      .def_property_readonly("span", [](const tml::GroupSpec& spec) {
        return spec.window > 0 ? std::nullopt : std::optional(spec.span);
      });
}

using PyPageTable = py::class_<tml::PageTable>;

void bind_transactions(PyPageTable& table) {
  table.def("reserve", on_session(&tml::PageTable::reserve), py::arg("session"), py::arg("runs"))
      .def("append", &tml::bind::append, py::arg("session"), py::arg("page_class"),
           py::arg("tokens"), py::arg("rows"), py::arg("column") = 0)
      .def("commit", on_session(&tml::PageTable::commit), py::arg("session"))
      .def("roll_back", on_session(&tml::PageTable::roll_back), py::arg("session"))
      .def("tick", &tml::PageTable::tick, py::arg("n"))
      .def("reserve_all", &tml::bind::reserve_all, py::arg("sessions"), py::arg("page_classes"),
           py::arg("tokens"))
      .def("append_all", &tml::bind::append_all, py::arg("sessions"), py::arg("page_classes"),
           py::arg("tokens"), py::arg("columns"), py::arg("rows"), py::arg("positions"))
      .def(
          "commit_all",
          [](tml::PageTable& self, const py::sequence& sessions) {
            self.commit_all(sessions_of(sessions));
          },
          py::arg("sessions"))
      .def("place", &tml::bind::place, py::arg("rows"), py::arg("positions"),
           py::arg("placed_rows"), py::arg("placed_positions"))
      .def("take_deltas", &tml::bind::take_deltas, py::arg("out"))
      .def("send_again", &tml::PageTable::send_again)
      .def("__repr__", [](const tml::PageTable&) { return "PageTable"; })  // in pybind11's errors
      .def("first_key", &tml::PageTable::first_key, py::arg("group"))
      .def_property_readonly("num_keys", &tml::PageTable::num_keys)
      .def_property_readonly("num_placed", &tml::PageTable::num_placed)
      .def_property_readonly("num_deltas", &tml::PageTable::num_deltas);
}

void bind_sessions(PyPageTable& table, const Tuples& make) {
  table
      .def(
          "open",
          [make](tml::PageTable& self, const std::map<tml::PageClass, int64_t>& budgets,
                 int64_t priority) {
            const auto session = self.open(budgets_of(budgets), priority);
            return make.session(session.slot, session.epoch);
          },
          py::arg("budgets"), py::kw_only(), py::arg("priority") = 0)
      .def("close", on_session(&tml::PageTable::close), py::arg("session"))
      .def("roll", on_session(&tml::PageTable::roll), py::arg("session"), py::arg("group"),
           py::arg("pages"))
      .def(
          "evictable",
          [](const tml::PageTable& self, const py::tuple& session, int64_t group) {
            return self.evictable(session_of(session), group);
          },
          py::arg("session"), py::arg("group"))
      .def("mark", on_session(&tml::PageTable::mark), py::arg("session"))
      .def(
          "rewind",
          [make](tml::PageTable& self, const py::tuple& handle, std::optional<int64_t> position) {
            const auto session = session_of(handle);
            return make.copies(position ? self.rewind(session, *position)
                                        : self.rewind_to_mark(session));
          },
          py::arg("session"), py::arg("position") = py::none())
      .def(
          "fork",
          [make](tml::PageTable& self, const py::tuple& session, int64_t priority) {
            const auto [child, commands] = self.fork(session_of(session), priority);
            return py::make_tuple(make.session(child.slot, child.epoch), make.copies(commands));
          },
          py::arg("session"), py::kw_only(), py::arg("priority") = 0)
      .def(
          "victim",
          [make](const tml::PageTable& self, const py::tuple& session) {
            const auto victim = self.victim(session_of(session));
            return make.session(victim.slot, victim.epoch);
          },
          py::arg("session"));
}

void bind_images(PyPageTable& table, const Tuples& make) {
  const auto pages_of = [make](std::vector<tml::PageRef> (tml::PageTable::*verb)(tml::Session)) {
    return [make, verb](tml::PageTable& self, const py::tuple& session) {
      return make.pages((self.*verb)(session_of(session)));
    };
  };
  table.def("suspend", pages_of(&tml::PageTable::suspend), py::arg("session"))
      .def("resume", pages_of(&tml::PageTable::resume), py::arg("session"))
      .def(
          "image",
          [make](const tml::PageTable& self, const py::tuple& session) {
            return make.image(self.image(session_of(session)));
          },
          py::arg("session"))
      .def(
          "restore",
          [make](tml::PageTable& self, const py::object& image) {
            const auto session = self.restore(image_of(image));
            return make.session(session.slot, session.epoch);
          },
          py::arg("image"));
}

void bind_stats(PyPageTable& table, const Tuples& make) {
  table
      .def(
          "pages",
          [make](const tml::PageTable& self, const py::tuple& session, int64_t group) {
            return make.pages(self.pages(session_of(session), group));
          },
          py::arg("session"), py::arg("group"))
      .def("positions", on_session(&tml::PageTable::positions), py::arg("session"),
           py::arg("group"))
      .def(
          "session_stats",
          [make](const tml::PageTable& self, const py::tuple& session) {
            const auto s = self.stats(session_of(session));
            return make.session_stats(s.length, s.priority, s.in_transaction, s.suspended, s.pages);
          },
          py::arg("session"))
      .def("stats",
           [make](const tml::PageTable& self) {
             py::list list;
             for (const auto& s : self.stats()) {
               list.append(
                   make.group_stats(s.pages, s.free, s.waiting, s.reserved, s.held, s.shared));
             }
             return list;
           })
      .def("length", on_session(&tml::PageTable::length), py::arg("session"))
      .def("lengths", &tml::PageTable::lengths)
      .def(
          "held",
          [](const tml::PageTable& self, const py::sequence& sessions, int64_t group) {
            return self.held(sessions_of(sessions), group);
          },
          py::arg("sessions"), py::arg("group"))
      .def_property_readonly("dropped", &tml::PageTable::dropped)
      .def_property_readonly("num_sessions", &tml::PageTable::num_sessions)
      .def_property_readonly("work", &tml::PageTable::work)
      .def("check_invariants", &tml::PageTable::check_invariants);
}

void bind_page_table(py::module_& m) {
  bind_errors(m);
  bind_kv_types(m);
  const Tuples make(m);
  PyPageTable table(m, "PageTable");
  table.def(py::init<std::vector<tml::GroupSpec>, int64_t, int64_t>(), py::arg("groups"),
            py::kw_only(), py::arg("max_sessions"), py::arg("lag"));
  bind_sessions(table, make);
  bind_transactions(table);
  bind_images(table, make);
  bind_stats(table, make);
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "Host code of tml_kernels.";
  m.def("build_info", &build_info, "How this build was made: compiler, flags, CUDA architectures.");
  bind_page_table(m);
}
