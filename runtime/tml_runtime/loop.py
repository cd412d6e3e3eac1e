"""Runtime: the loop that runs a model's ticks for all sessions, in real time or on a virtual clock.

One tick is `Runtime._run`. It takes no lock another thread can hold, writes no log line, and waits
for nobody; README.md of this folder lists what it promises and which test holds it to that.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from ._tick import Schedule, TickThread, now_ns
from .checks import Sampling
from .clock import QuietCollector, VirtualClock, quick_switches, torch_threads
from .delivery import Delivery
from .errors import LoopFailed, NotRunning
from .handoff import BackgroundModel, Handoff, HandoffOptions, Policy
from .metrics import Metrics
from .model import InteractionModel, KvBudget, TickInput, TickOutput, TurnLayout
from .nvtx import ranges
from .options import check_int, check_type, checked_layout, checked_prompt, mailbox_spec
from .overload import Overload
from .room import make_room
from .session import Session
from .slots import Batch, Seat, Slots
from .text import ByteTokenizer, Tokenizer
from .upkeep import ALWAYS, Upkeep
from .vocoder import Vocoder
from .voices import make_voices
from .warm_up import WarmUp
from .watch import Watch


class Runtime:
    """Runs `model` for up to `num_slots` sessions; a context manager that starts and stops it.

    realtime: a thread runs tick n at start + (n + 1) * period, from `start` to `stop`. Otherwise
    time stands still until `run_ticks`, and the same seed and input give the same bytes. Queues are
    bounded: input may lie `max_lead_ticks` ahead, output is kept for `output_queue_ticks`.
    """

    def __init__(
        self,
        model: InteractionModel,
        *,
        layout: TurnLayout | None = None,
        num_slots: int = 1,
        seed: int = 0,
        realtime: bool = True,
        tokenizer: Tokenizer | None = None,
        vocoder: Callable[[], Vocoder] | None = None,
        budget: KvBudget | None = None,
        global_pages: int | Literal["auto"] | None = None,
        page_dtype: torch.dtype | None = None,
        drafts: bool = False,
        probe_ticks: int = 0,
        max_frame_pairs: int = 1,
        max_lead_ticks: int = 16,
        output_queue_ticks: int = 64,
        cpu_threads: int = 1,
        black_box: Path | None = None,
        background: BackgroundModel | None = None,
        handoff: HandoffOptions | None = None,
    ) -> None:
        """budget: what a session remembers of each kind of tokens; it rolls for ever within it.
        global_pages: of all sessions' global layers, by default as their budgets need; with fewer
        there are fewer sessions; "auto": no more than fit in the GPU's memory beside the graphs.
        page_dtype: of keys and values, by default the model's; torch.float8_e4m3fn takes half of
        bfloat16. drafts: ticks draft output steps, see `InteractionModel.new_state`; `report` has
        `passes` and `drafts_kept`. probe_ticks: `start` runs so many ticks of 1, 2, 4, .. sessions
        and admits as many as were in time; 0: one for every slot. max_frame_pairs: of video, per
        tick. vocoder: makes one for a slot, by default Griffin-Lim, which on a GPU runs there for
        all slots. cpu_threads: torch's in the whole process while the loop runs; products as small
        as a tick's gain nothing from more, and wait for them when a core is busy. black_box: a
        folder that gets a file with the newest ticks when one misses, a session faults or the loop
        fails; see `blackbox`. background: answers what the model delegates; without one,
        `delegate` is an action like any other. Raises InputTypeError or InputValueError naming it.
        """
        sizes = {
            "num_slots": num_slots, "max_frame_pairs": max_frame_pairs,
            "max_lead_ticks": max_lead_ticks, "output_queue_ticks": output_queue_ticks,
            "cpu_threads": cpu_threads,
        }  # fmt: skip
        for name, value in sizes.items():
            check_int(name, value, at_least=1)
        check_int("seed", seed, at_least=0)
        check_int("probe_ticks", probe_ticks, at_least=0)
        check_type("budget", budget, KvBudget)
        check_type("handoff", handoff, HandoffOptions)
        self._layout = checked_layout(model.config, layout)
        self._spec = mailbox_spec(
            model.config, self._layout, max_frame_pairs, max_lead_ticks, output_queue_ticks
        )
        self._model = model
        # Of a model on several ranks: to tell the others that there is nothing to do in a tick.
        self._keep_alive: Callable[[], None] | None = getattr(model, "keep_alive", None)
        self._budget = budget or KvBudget()
        options = handoff or HandoffOptions()
        num_spare = 0 if background is None else options.snapshots
        self._state, self._graphs, self._admission = make_room(
            model, num_slots, num_spare, self._budget, global_pages, page_dtype, drafts
        )
        self._probe_ticks = probe_ticks
        self._tokenizer = ByteTokenizer() if tokenizer is None else tokenizer
        parts = (options, model.config, self._tokenizer, self._state)
        self._handoff = Handoff(background, *parts, first_spare=num_slots)
        self._voices = make_voices(vocoder, self._layout, num_slots, model.device)
        self._slots = Slots(num_slots)
        self._batch = Batch(num_slots, self._spec.window_samples)
        self._metrics = Metrics(period_ns=self._spec.window_ns, ranges=ranges())
        self._delivery = Delivery(self._state, self._voices, self._metrics)
        self._collector = QuietCollector()
        self._overload = Overload()
        self._upkeep = Upkeep(model, self._state, self._voices, self._now_ns, self._metrics)
        ready = (model, self._state, self._batch, self._voices, self._upkeep)
        self._warm_up = WarmUp(*ready, num_slots=num_slots)
        self._cpu_threads = cpu_threads
        self._borrowed = ExitStack()

        self.clock = None if realtime else VirtualClock()
        self._schedule = Schedule(0, self._spec.window_ns)  # of the virtual clock
        self._thread = TickThread(self._step, self._spec.window_ns) if realtime else None
        self._phase = "new" if realtime else "running"
        self._failure: BaseException | None = None
        self._next_tick = 0
        self._seed = seed
        self._num_opened = 0
        self._lock = threading.Lock()  # clients only: open, start, stop
        settings = {**sizes, "seed": seed, "realtime": realtime, "budget": budget}
        settings |= {"global_pages": global_pages, "probe_ticks": probe_ticks, "handoff": options}
        settings["drafts"] = drafts
        settings["page_dtype"] = page_dtype and str(page_dtype)
        settings["background"] = background and type(background).__name__
        self._watch = Watch(self, model, black_box, settings)
        if not realtime:
            self._borrowed.callback(self._handoff.stop)
            self._borrowed.enter_context(self._watch)

    @property
    def layout(self) -> TurnLayout:
        return self._layout

    @property
    def slots_in_use(self) -> int:
        return len(self._slots) - self._slots.num_free

    @property
    def metrics(self) -> Metrics:
        """Per-tick records for traces and plots; `report` sums them up."""
        return self._metrics

    @property
    def gpu_samples(self) -> np.ndarray:
        """What the GPU said of itself once a second, oldest first: dtype `gpu.SAMPLE`."""
        return self._watch.gpu.samples()

    def __enter__(self) -> Runtime:
        if self._thread is not None:
            self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # Clients

    def open_session(
        self,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int | None = None,
        prompt: str | Sequence[int] | None = None,
        priority: int = 0,
        handoff_policy: Policy | None = None,
    ) -> Session:
        """A new session; its media clock starts with the next window that begins; before
        `start`, that is the first one.

        prompt: text, or token ids, that the model reads before anything else and never forgets, at
        most `KvBudget.anchor` tokens. It is read in time that ticks leave; windows that end before
        that pass unheard (`stats.absent_ticks`). priority: where pages run out, sessions of a lower
        one leave the device first. handoff_policy: when answers of the background model reach the
        live one, by default as in HandoffOptions.

        temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off; see `tml_kernels.sample`.
        Without a seed, it is the runtime's and how many were opened before that decide. Raises
        ResourceExhausted, with figures, when there is no slot, no time or no page for one more.
        """
        with self._lock:
            self.check_alive()
            if seed is None:
                words = np.random.SeedSequence([self._seed, self._num_opened])
                seed = int(words.generate_state(1, np.uint64)[0] >> np.uint64(1))
            sampling = Sampling(temperature, top_k, top_p, min_p, seed)
            check_int("priority", priority, at_least=-(2**31), at_most=2**31 - 1)
            vocab, anchor = self._model.config.vocab, self._budget.anchor
            ids = checked_prompt(prompt, self._tokenizer, vocab, anchor)
            if self._thread is None:  # no thread is in a tick, so slots can be freed right here
                self._release()
            open_tick = -(-self.media_ns() // self._spec.window_ns)
            seat = Seat(self._spec, sampling, open_tick, prompt=ids, priority=priority)
            seat.inbox.line = self._handoff.open(seat, handoff_policy, ids)
            self._slots.claim(seat, self._admission)
            self._num_opened += 1
        return Session(seat, self, layout=self._layout, vocab=vocab, tokenizer=self._tokenizer)

    def start(self) -> None:
        """Begin real time, once. Runs the model on silence first, so that no tick is the first."""
        with self._lock:
            if self._thread is None:
                raise NotRunning("start: this runtime has a virtual clock; call run_ticks(n)")
            if self._phase != "new":
                raise NotRunning(f"start: the runtime is {self._phase} already; make a new one")
            with ExitStack() as borrowed:  # settings of the process; `stop` gives them back
                borrowed.enter_context(self._watch)
                borrowed.enter_context(torch_threads(self._cpu_threads))
                self._warm_up.run()
                if self._probe_ticks > 0:
                    by_time, table = self._warm_up.probe(self._probe_ticks)
                    self._admission = replace(self._admission, by_time=by_time, table=table)
                borrowed.callback(self._handoff.stop)
                self._handoff.start()
                borrowed.enter_context(self._collector)
                borrowed.enter_context(quick_switches())
                self._thread.start()
                self._borrowed = borrowed.pop_all()
            self._phase = "running"

    def stop(self) -> None:
        """End the loop and all sessions, which may still be polled. More than once is no error.

        Raises LoopFailed when a tick had raised.
        """
        with self._lock:
            was_running = self._phase == "running"
            self._phase = "stopped"
            if not was_running:
                return
            try:
                if self._thread is not None:
                    self._thread.stop()
            except Exception as error:
                raise LoopFailed("the tick raised, which ended the loop") from error
            finally:
                self._borrowed.close()

    def run_ticks(self, num_ticks: int) -> None:
        """Run that many ticks of the virtual clock, from this thread. Raises LoopFailed."""
        clock = self.clock
        if clock is None:
            raise NotRunning("run_ticks: this runtime runs in real time; call start()")
        check_int("num_ticks", num_ticks, at_least=0)
        self.check_alive()
        with torch_threads(self._cpu_threads):
            for _ in range(num_ticks):
                self._handoff.before_tick()
                clock.sleep_until(self._schedule.next_wake_ns)
                tick, _ = self._schedule.begin(clock.now_ns())
                try:
                    self._step(tick)
                except Exception as error:
                    raise LoopFailed("the tick raised, which ended the loop") from error
                self._schedule.end(clock.now_ns())

    def report(self) -> dict:
        """What happened so far: `Metrics.report`, the mode, the slots, and how the thread runs."""
        return {
            "mode": "realtime" if self._thread is not None else "virtual",
            "period_ms": self._layout.period_ms,
            "slots": len(self._slots),
            "slots_free": self._slots.num_free,
            "sessions_opened": self._num_opened,
            "sessions_refused": self._slots.num_refused,
            "admission": self._admission.report(),
            "graphs": None if self._graphs is None else self._graphs.report(),
            "scheduling": None if self._thread is None else self._thread.scheduling,
            "handoff": self._handoff.report(),
            **self._watch.report(),
            **self._metrics.report(),
        }

    def status(self) -> dict:
        """`report`, the sessions and the newest ticks: plain data for JSON, from any thread."""
        return self._watch.status(self._slots.seats(), self.media_ns())

    def check_alive(self) -> None:
        """Raises LoopFailed when a tick raised, NotRunning after `stop`."""
        if self._failure is not None:
            raise LoopFailed("the tick raised, which ended the loop") from self._failure
        if self._phase == "stopped":
            raise NotRunning("the runtime was stopped: make a new one")

    def media_ns(self) -> int:
        """Time since tick 0's window began; 0 before `start`."""
        start_ns = self._start_ns()
        return 0 if start_ns is None else self._now_ns() - start_ns

    # The tick

    def _step(self, tick: int) -> None:
        try:
            with torch.inference_mode():
                self._run(tick)
        except BaseException as error:
            self._failure = error
            self._watch.failed(tick, error)
            raise

    def _run(self, tick: int) -> None:
        skipped = tick - self._next_tick
        deadline_ns = self._open_record(tick)
        seats = self._admit(tick)
        shed = self._overload.shed
        seats, inputs = self._batch.fill(seats, tick, self._metrics, shed)  # what comes now is late
        self._metrics.lap("take")
        if seats:
            self._metrics.launch()
            self._delivery.publish(tick, seats, self._think(inputs))
            self._metrics.lap("publish")
        elif self._keep_alive is not None:
            self._keep_alive()
        done_ns, throttle = self._now_ns(), self._watch.throttle
        wrong = self._metrics.close(done_ns=done_ns, deadline_ns=deadline_ns, throttle=throttle)
        self._overload.observe(skipped > 0 or done_ns > deadline_ns)
        end_ns = ALWAYS if self._thread is None else deadline_ns
        if self._upkeep.rest(self._slots.seats(), tick, end_ns):
            wrong = "fault"
        if wrong is not None:
            self._watch.went_wrong(wrong, tick, done_ns)
        if self._thread is not None:
            self._collector.rest(deadline_ns - self._now_ns())

    def _open_record(self, tick: int) -> int:
        """Returns the tick's deadline. Ticks that never ran are counted; nothing is replayed."""
        woke_ns, period_ns = self._now_ns(), self._spec.window_ns
        scheduled_ns = (self._start_ns() or 0) + (tick + 1) * period_ns
        self._metrics.open(tick, scheduled_ns=scheduled_ns, woke_ns=woke_ns)
        self._metrics.add("skipped", tick - self._next_tick)
        self._next_tick = tick + 1
        return scheduled_ns + period_ns

    def _admit(self, tick: int) -> list[Seat]:
        self._release()
        seats, absent = self._slots.due(tick)
        for seat in absent:
            self._guard(seat, tick, seat.sit_out, tick)
        for seat in seats:
            if not seat.admitted:
                self._guard(seat, tick, self._upkeep.begin, seat)
        for seat in self._slots.seats():  # the paused too: the cache will not remember for long
            if not seat.over:
                self._guard(seat, tick, self._upkeep.take_back, seat)
        return [seat for seat in seats if not seat.over]

    def _guard(self, seat: Seat, tick: int, call: Callable[..., object], *args: object) -> None:
        """What goes wrong for one session ends that one."""
        try:
            call(*args)
        except Exception as error:
            seat.fail(tick, error)
            self._metrics.add("faults", 1)

    def _release(self) -> None:
        """Free the slots of sessions that are over, and give back all that they hold."""
        for slot in self._slots.sweep():
            self._state.reset(slot)
        self._handoff.release()

    def _think(self, inputs: TickInput) -> TickOutput:
        out = self._model.tick(self._state, inputs)
        self._metrics.lap("model")
        self._metrics.set_output(out)
        return out

    def _now_ns(self) -> int:
        return now_ns() if self.clock is None else self.clock.now_ns()

    def _start_ns(self) -> int | None:
        """When tick 0's window began, on the clock of `_now_ns`; None before `start`."""
        if self._thread is None:
            return 0
        return self._thread.start_ns or None
