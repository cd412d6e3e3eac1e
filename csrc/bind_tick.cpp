// tml_runtime._tick: the tick thread's parts for Python. Links no CUDA.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "bind_array.h"
#include "tick/audio_windows.h"
#include "tick/clock.h"
#include "tick/cut_patches.h"
#include "tick/ring.h"
#include "tick/schedule.h"
#include "tick/tick_layout.h"
#include "tick/tick_thread.h"

namespace py = pybind11;

namespace {

// A borrowed view of an object's bytes; refuses objects that have no contiguous ones.
class ByteView {
 public:
  explicit ByteView(py::handle object, bool writable = false) {
    const int flags = writable ? PyBUF_WRITABLE : PyBUF_SIMPLE;
    if (PyObject_GetBuffer(object.ptr(), &view_, flags) != 0) throw py::error_already_set();
  }
  ~ByteView() { PyBuffer_Release(&view_); }
  ByteView(const ByteView&) = delete;
  ByteView& operator=(const ByteView&) = delete;

  void* data() const { return view_.buf; }
  size_t size() const { return static_cast<size_t>(view_.len); }

 private:
  Py_buffer view_;
};

bool push(tml::Ring& ring, const py::args& data) {
  std::deque<ByteView> views;  // they do not move
  std::vector<tml::Ring::Part> parts;
  for (const py::handle& part : data) {
    const ByteView& view = views.emplace_back(part);
    parts.push_back({view.data(), view.size()});
  }
  return ring.push(parts.data(), parts.size());
}

py::object pop_bytes(tml::Ring& ring) {
  const auto size = ring.front_size();
  if (!size) return py::none();
  auto* bytes = PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(*size));
  if (bytes == nullptr) throw py::error_already_set();
  ring.pop(PyBytes_AS_STRING(bytes), *size);
  return py::reinterpret_steal<py::object>(bytes);
}

// A Python callable as what a tick calls. The thread keeps one Python thread state for all its
// ticks, as threading.local expects.
class Step final : public tml::TickStep {
 public:
  explicit Step(py::object target) : target_(std::move(target)) {
    if (PyCallable_Check(target_.ptr()) == 0) {
      throw py::type_error(std::string("step: expected a callable, got ") +
                           Py_TYPE(target_.ptr())->tp_name);
    }
  }

  bool run(int64_t tick) override {
    if (state_ == nullptr) {
      gil_ = PyGILState_Ensure();
    } else {
      PyEval_RestoreThread(state_);
    }
    const bool done = call(tick);
    state_ = PyEval_SaveThread();
    return done;
  }

  void leave() override {
    if (state_ == nullptr) return;
    PyEval_RestoreThread(state_);
    PyGILState_Release(gil_);
  }

  // Raises the step's exception, if there is one, from where the step raised it.
  void raise_error() const {
    if (!error_) return;
    PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(error_.ptr()));
    Py_INCREF(type);
    PyErr_Restore(type, py::object(error_).release().ptr(), py::object(trace_).release().ptr());
    throw py::error_already_set();
  }

  // For the garbage collector: a step and its traceback usually refer to their own tick thread.
  int traverse(visitproc visit, void* arg) const {
    Py_VISIT(target_.ptr());
    Py_VISIT(error_.ptr());
    Py_VISIT(trace_.ptr());
    return 0;
  }
  void clear() { target_ = error_ = trace_ = py::object(); }

 private:
  bool call(int64_t tick) {
    try {
      const py::object step = target_;
      step(tick);
      return true;
    } catch (py::error_already_set& error) {
      error_ = error.value();
      trace_ = error.trace();
      return false;
    }
  }

  py::object target_, error_, trace_;
  PyThreadState* state_ = nullptr;
  PyGILState_STATE gil_{};
};

std::shared_ptr<Step> make_step(py::object target) {
  // The last owner may be the tick thread, which does not hold the GIL.
  return {new Step(std::move(target)), [](Step* step) {
            const py::gil_scoped_acquire gil;
            delete step;
          }};
}

class TickThread {
 public:
  TickThread(py::object step, const tml::TickOptions& options)
      : step_(make_step(std::move(step))), thread_(step_, options) {}

  ~TickThread() {
    try {
      join();
    } catch (py::error_already_set& error) {
      error.discard_as_unraisable("TickThread");
    }
  }

  void start(py::handle self) {
    // At exit, before the interpreter is torn down: a thread must not ask for the GIL after that.
    py::cpp_function at_exit([weak = py::weakref(self)] {
      const py::object object = weak();
      if (!object.is_none()) object.cast<TickThread&>().join();
    });
    {
      const py::gil_scoped_release no_gil;
      thread_.start();
    }
    py::module_::import("atexit").attr("register")(at_exit);
    at_exit_ = std::move(at_exit);
  }

  void stop() {
    join();
    if (thread_.failed()) step_->raise_error();
  }

  py::list drain(const py::object& record_type) {
    py::list records;
    while (const auto r = thread_.pop_record()) {
      records.append(
          record_type(r->tick, r->scheduled_ns, r->woke_ns, r->done_ns, r->missed, r->skipped));
    }
    if (records.empty() && thread_.failed()) step_->raise_error();
    return records;
  }

  const tml::TickThread& thread() const { return thread_; }

  int traverse(visitproc visit, void* arg) const { return step_->traverse(visit, arg); }

  void clear() {
    join();
    step_->clear();
  }

 private:
  void join() {
    {
      const py::gil_scoped_release no_gil;
      thread_.stop();
    }
    if (at_exit_ && !thread_.running()) {  // a step that stops its own thread is still running
      py::module_::import("atexit").attr("unregister")(at_exit_);
      at_exit_ = py::object();
    }
  }

  std::shared_ptr<Step> step_;
  tml::TickThread thread_;
  py::object at_exit_;
};

// Teaches the collector about the objects that a TickThread holds in C++.
void set_up_gc(PyHeapTypeObject* heap_type) {
  auto* type = &heap_type->ht_type;
  type->tp_flags |= Py_TPFLAGS_HAVE_GC;
  type->tp_traverse = [](PyObject* self, visitproc visit, void* arg) -> int {
    Py_VISIT(Py_TYPE(self));
    auto* instance = reinterpret_cast<py::detail::instance*>(self);
    if (!instance->get_value_and_holder().holder_constructed()) return 0;
    return py::cast<TickThread&>(py::handle(self)).traverse(visit, arg);
  };
  type->tp_clear = [](PyObject* self) -> int {
    py::cast<TickThread&>(py::handle(self)).clear();
    return 0;
  };
}

void bind_ring(py::module_& m) {
  py::class_<tml::Ring>(m, "Ring")
      .def(py::init<size_t>(), py::arg("capacity_bytes"))
      .def("push", &push)
      .def("pop", &pop_bytes)
      .def("__len__", &tml::Ring::size)
      .def_property_readonly("capacity", &tml::Ring::capacity)
      .def_property_readonly("max_message", &tml::Ring::max_message)
      .def_property_readonly("dropped", &tml::Ring::dropped);
}

int64_t take_window(tml::AudioWindows& windows, py::handle pcm_N, py::handle have_N) {
  const ByteView pcm(pcm_N, true), have(have_N, true);
  const auto num_samples = static_cast<size_t>(windows.num_samples());
  TML_CHECK(pcm.size() == num_samples * sizeof(float), "pcm: bytes=", pcm.size(),
            " samples=", num_samples);
  TML_CHECK(have.size() == num_samples, "have: bytes=", have.size(), " samples=", num_samples);
  return windows.take(static_cast<float*>(pcm.data()), static_cast<uint8_t*>(have.data()));
}

void bind_audio_windows(py::module_& m) {
  py::class_<tml::AudioWindows>(m, "AudioWindows")
      .def(py::init<int64_t, int64_t>(), py::arg("num_windows"), py::arg("num_samples"))
      .def("forget_before", &tml::AudioWindows::forget_before, py::arg("window"))
      .def(
          "write",
          [](tml::AudioWindows& windows, int64_t start, py::handle pcm) {
            const ByteView view(pcm);
            TML_CHECK(view.size() % sizeof(float) == 0, "pcm: bytes=", view.size());
            return windows.write(start, view.data(), view.size() / sizeof(float));
          },
          py::arg("start"), py::arg("pcm"))
      .def("drain", &tml::AudioWindows::drain, py::arg("ring"), py::arg("max_pieces"))
      .def("take", &take_window, py::arg("pcm"), py::arg("have"));
}

// A caller's contiguous arrays, which live as long as the layout that fills them.
class TickLayout {
 public:
  TickLayout(const std::vector<int32_t>& kinds_R, const py::kwargs& arrays)
      : arrays_(arrays), layout_(kinds_of(kinds_R), borrow()) {}

  void fill(const std::vector<int64_t>& slots, const py::buffer& counts,
            const std::vector<int32_t>& ids) {
    const tml::bind::Array<int64_t> count_S_R(counts, "counts", false);
    layout_.fill(slots, {count_S_R.data(), count_S_R.size()}, ids);
  }

  void set_lengths() { layout_.set_lengths(); }

 private:
  static std::vector<tml::TokenKind> kinds_of(const std::vector<int32_t>& numbers) {
    std::vector<tml::TokenKind> kinds;
    for (const int32_t number : numbers) kinds.push_back(static_cast<tml::TokenKind>(number));
    return kinds;
  }

  template <typename T>
  tml::Numbers<T> borrow(const char* name) {
    TML_CHECK(arrays_.contains(name), name, " is not given");
    const tml::bind::Array<T> array(arrays_[name], name, true);
    return {array.data(), array.size()};
  }

  tml::TickArrays borrow() {
    return {borrow<int32_t>("kind_T"),     borrow<int32_t>("index_T"),
            borrow<int32_t>("slot_S"),     borrow<int32_t>("start_S1"),
            borrow<int64_t>("at_S"),       borrow<int64_t>("last_S"),
            borrow<int64_t>("length_O_S"), borrow<int64_t>("said_N"),
            borrow<int64_t>("steps_N"),    borrow<int64_t>("tokens_S_A"),
            borrow<int64_t>("column_S_A"), borrow<int64_t>("position_Z")};
  }

  py::dict arrays_;  // keeps them alive
  tml::TickLayout layout_;
};

void bind_tick_layout(py::module_& m) {
  py::class_<TickLayout>(m, "TickLayout")
      .def(py::init<const std::vector<int32_t>&, const py::kwargs&>(), py::arg("kinds"))
      .def("fill", &TickLayout::fill, py::arg("slots"), py::arg("counts"), py::arg("ids"))
      .def("set_lengths", &TickLayout::set_lengths);
}

// Groups of frames [H, W, 3] to `out` [P, frames of a group, side, side, 3].
void cut_patches(const py::sequence& frames, int64_t columns, const py::buffer& out) {
  const tml::bind::Array<uint8_t> patches(out, "out", true, 5, "[P, frames, side, side, 3]");
  const int64_t num_patches = patches.size(0), length = patches.size(1), side = patches.size(2);
  const auto num_frames = static_cast<int64_t>(frames.size());
  TML_CHECK(length > 0 && num_frames % length == 0, "frames=", num_frames, " of a group=", length);
  TML_CHECK(side > 0 && patches.size(3) == side && patches.size(4) == tml::kChannels,
            "out: side=", side, " ", patches.size(3), " channels=", patches.size(4));
  if (num_frames == 0) return;
  const int64_t num_groups = num_frames / length;
  TML_CHECK(columns > 0 && num_patches % (num_groups * columns) == 0, "columns=", columns,
            " groups=", num_groups, " patches=", num_patches);
  std::deque<tml::bind::Array<uint8_t>> views;  // they do not move
  std::vector<tml::Picture> pictures;
  for (const py::handle& frame : frames) {
    const auto& view = views.emplace_back(frame.cast<py::buffer>(), "frame", false, 3, "[H, W, 3]");
    TML_CHECK(view.size(2) == tml::kChannels, "frame: channels=", view.size(2));
    pictures.push_back({view.data(), view.size(0), view.size(1)});
  }
  const tml::PatchGrid grid{num_patches / (num_groups * columns), columns, side};
  tml::cut_patches(pictures, length, grid, patches.data());
}

void bind_schedule(py::module_& m) {
  py::class_<tml::Schedule>(m, "Schedule")
      .def(py::init<int64_t, int64_t>(), py::arg("start_ns"), py::arg("period_ns"))
      .def("wake_ns", &tml::Schedule::wake_ns, py::arg("tick"))
      .def("deadline_ns", &tml::Schedule::deadline_ns, py::arg("tick"))
      .def(
          "begin",
          [](tml::Schedule& schedule, int64_t now_ns) {
            const auto begun = schedule.begin(now_ns);
            return py::make_tuple(begun.tick, begun.skipped);
          },
          py::arg("now_ns"))
      .def("end", &tml::Schedule::end, py::arg("now_ns"), py::arg("failed") = false)
      .def_property_readonly("start_ns", &tml::Schedule::start_ns)
      .def_property_readonly("period_ns", &tml::Schedule::period_ns)
      .def_property_readonly("next_wake_ns", &tml::Schedule::next_wake_ns)
      .def_property_readonly("next_tick", &tml::Schedule::next_tick)
      .def_property_readonly("ticks", &tml::Schedule::ticks)
      .def_property_readonly("misses", &tml::Schedule::misses)
      .def_property_readonly("skipped", &tml::Schedule::skipped);
}

template <auto Member>
auto reads() {
  return [](const TickThread& self) { return (self.thread().*Member)(); };
}

void bind_tick_thread(py::module_& m) {
  const py::object record_type = py::module_::import("collections")
                                     .attr("namedtuple")("TickRecord",
                                                         "tick scheduled_ns woke_ns done_ns missed "
                                                         "skipped",
                                                         py::arg("module") = m.attr("__name__"));
  m.attr("TickRecord") = record_type;
  py::class_<TickThread>(m, "TickThread", py::custom_type_setup(&set_up_gc))
      .def(py::init([](py::object step, int64_t period_ns, int64_t spin_ns, int priority,
                       int64_t max_records) {
             const tml::TickOptions options{period_ns, spin_ns, priority, max_records};
             return std::make_unique<TickThread>(std::move(step), options);
           }),
           py::arg("step"), py::arg("period_ns"), py::kw_only(), py::arg("spin_ns") = 500'000,
           py::arg("priority") = 0, py::arg("max_records") = 4096)
      .def("start", [](py::handle self) { self.cast<TickThread&>().start(self); })
      .def("stop", &TickThread::stop)
      .def("drain", [record_type](TickThread& self) { return self.drain(record_type); })
      .def_property_readonly("start_ns", reads<&tml::TickThread::start_ns>())
      .def_property_readonly("ticks", reads<&tml::TickThread::ticks>())
      .def_property_readonly("misses", reads<&tml::TickThread::misses>())
      .def_property_readonly("skipped", reads<&tml::TickThread::skipped>())
      .def_property_readonly("records_dropped", reads<&tml::TickThread::records_dropped>())
      .def_property_readonly("running", reads<&tml::TickThread::running>())
      .def_property_readonly("scheduling", reads<&tml::TickThread::scheduling>());
}

}  // namespace

PYBIND11_MODULE(_tick, m) {
  m.doc() = "The tick thread's parts: clock, rings, layout, patches, schedule, thread.";
  m.def("now_ns", &tml::now_ns, "CLOCK_MONOTONIC in nanoseconds.");
  bind_ring(m);
  bind_audio_windows(m);
  bind_tick_layout(m);
  m.def("cut_patches", &cut_patches, py::arg("frames"), py::arg("columns"), py::arg("out"));
  bind_schedule(m);
  bind_tick_thread(m);
}
