"""What the ranks of tests do, and a model small enough for four of them."""

# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import os
import threading
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from tml_kernels.kv_cache import PageClass
from tml_kernels.ops.patch_embed import PatchSpec
from tml_runtime import InteractionModel, ModelConfig, Runtime
from tml_runtime.errors import LoopFailed
from tml_runtime.graph import TickGraphs
from tml_runtime.model import KvBudget, ModelState, TickInput
from tml_runtime.model.config import ExpertSpec, FlowSpec, HeadSpec, Vocabulary
from tml_runtime.parallel import LeadModel, Ranks, follow
from tml_runtime.parallel.ranks import FIRST_BLOCK, HEAD, LARGEST_BLOCK
from tml_runtime.parallel.shards import Shard, sessions_of

CONFIG = ModelConfig(
    name="shared",
    width=64,
    num_layers=3,
    local_heads=HeadSpec(num_heads=8, num_kv_heads=4, head_width=16, extent=8, window=8),
    global_heads=HeadSpec(num_heads=8, num_kv_heads=4, head_width=16, extent=12),
    global_layers=(1,),
    d_rel=4,
    dense_layers=(0,),
    dense_width=96,
    experts=ExpertSpec(num_experts=4, top_k=2, num_shared=1, width=32, route_scale=2.5),
    vocab=Vocabulary(size=128, num_valid=100, silence=96, missing=97, delegate=98, yield_turn=99),
    logits_divisor=2.0,
    patch=PatchSpec(patch=8, folds=(2, 4), widths=(64, 192)),
    flow=FlowSpec(width=32, depth=1, num_steps=2),
    tau_floor=16,
)
BUDGET = KvBudget(anchor=64, text=64, audio=64, video=64, reply=64, rewind=16)  # rolls soon


def join(rank: int, num_ranks: int, init_method: str, **options: Any) -> Ranks:
    options = {"timeout_s": 20.0, "start_timeout_s": 60.0} | options
    return Ranks.join(init_method=init_method, rank=rank, world_size=num_ranks, **options)


def tick_of(n: int, slots: list[int]) -> TickInput:
    """Tick n of the sessions in `slots`; slot -1 is idle. What a slot hears is its own."""
    pcm, missing, frames, text = [], [], [], []
    for slot in slots:
        dice = np.random.default_rng([n, slot + 1])
        pcm.append(0.1 * dice.standard_normal(CONFIG.layout.samples_per_tick).astype(np.float32))
        missing.append(bool(dice.integers(4) == 0))
        shape = (1, 2, 8, 16, 3)
        seen = dice.integers(3) > 0
        frames.append(dice.integers(0, 256, shape, dtype=np.uint8) if seen else None)
        text.append([int(token) for token in dice.integers(0, 90, dice.integers(4))])
    return TickInput(
        torch.tensor(slots, dtype=torch.int32),
        torch.from_numpy(np.stack(pcm)),
        torch.tensor(missing),
        frames=frames,
        text=text,
    )


def new_state(
    model: InteractionModel, num_slots: int = 3, page_dtype: torch.dtype | None = None
) -> ModelState:
    state = model.new_state(num_slots, budget=BUDGET, page_dtype=page_dtype)
    for slot in range(num_slots):
        state.set_sampling(slot, temperature=0.0 if slot == 0 else 0.9, top_k=20, seed=slot + 1)
    return state


def talk(
    model: InteractionModel,
    num_ticks: int,
    page_dtype: torch.dtype | None = None,
    mode: str | None = None,
) -> list[tuple[np.ndarray, ...]]:
    """What three sessions say: together, with idle rows, alone, and reset or rewound between. One
    has read so much before that its pages roll. mode: of `TickGraphs`, None: without buckets."""
    state, said = new_state(model, page_dtype=page_dtype), []
    if mode is not None:
        TickGraphs(model, state, mode=mode)
    append(model, state, 2, 200, PageClass.TEXT)
    for n in range(num_ticks):
        slots = [[0, 1, 2], [2, -1, 0], [1], [0, 2]][n % 4]
        if n == 3:
            state.reset(1)
            state.set_sampling(1, seed=5)
        if n == 5:
            state.cache.rewind(state.session(0), state.length(0))
            state.cache.suspend(state.session(2))
        out = model.tick(state, tick_of(n, slots))
        said.append((out.token_S_K.numpy(), out.mel_S_K_B.numpy(), out.fault_S.numpy(),
                     np.array(out.kv_pages), np.array(out.kv_dropped)))  # fmt: skip
    return said


def page_bytes(model: InteractionModel) -> int:
    groups = new_state(model).groups
    return sum(x.nbytes for g in groups for x in (g.pages.k_pages_L_P_G_R_C,
                                                  g.pages.v_pages_L_P_G_R_C))  # fmt: skip


def same_as_alone(
    rank: int, num_ranks: int, init_method: str, num_ticks: int, options: dict[str, Any]
) -> tuple[list[Any], int, int]:
    """Every rank runs the same ticks. What was said, this rank's bytes of pages and of weights."""
    page_dtype = options.pop("page_dtype", None)
    ranks = join(rank, num_ranks, init_method) if num_ranks > 1 else None
    model = InteractionModel.random(CONFIG, ranks=ranks, **options)
    return talk(model, num_ticks, page_dtype), page_bytes(model), layer_bytes(model)


def layer_bytes(model: InteractionModel) -> int:
    """Of the matrices of a model's layers that ranks share."""
    total = 0
    for w in model.weights.layers:
        mlp: Any = w.mlp
        experts = getattr(mlp, "experts", None)
        matrices: list[Any] = [w.attention.qkvr_J_D, w.attention.out_D_I]
        matrices += [experts.w13, experts.w2] if experts else [mlp.w13_J_D, mlp.w2_D_F]
        total += sum(getattr(matrix, "data", matrix).nbytes for matrix in matrices)
    return total


def led(
    rank: int, num_ranks: int, init_method: str, num_ticks: int, mode: str | None
) -> tuple[list[Any], Any] | int:
    """Rank 0 leads, the others follow; a prompt goes in before."""
    os.environ["TML_CHECK_RANKS"] = "1"
    model = InteractionModel.random(CONFIG, ranks=join(rank, num_ranks, init_method))
    if rank > 0:
        return follow(model)
    with LeadModel(model) as leader:
        return talk(leader, num_ticks, mode=mode), prompted(leader)


def prompted(model: InteractionModel) -> np.ndarray:
    """Logits after a prompt in one of two sessions."""
    h_T_D = append(model, new_state(model, 2), 1, 30, PageClass.ANCHOR)
    return model.logits(h_T_D).cpu().numpy()


def append(
    model: InteractionModel, state: ModelState, slot: int, num_tokens: int, page_class: PageClass
) -> torch.Tensor:
    start_S1, slot_S = (
        torch.tensor(v, dtype=torch.int32, device=model.device) for v in ([0, num_tokens], [slot])
    )
    x_T_D = model.embed_text([token % 90 for token in range(num_tokens)])
    return model.append(state, x_T_D, start_S1, slot_S, page_class)


def converse(runtime: Runtime, num_ticks: int) -> list[Any]:
    """Two sessions of a runtime on the virtual clock. One had a prompt, is interrupted and pauses;
    the other closes, and a third takes its slot."""
    said: list[Any] = []
    sessions = [
        runtime.open_session(seed=1, prompt="be brief"),
        runtime.open_session(seed=2, temperature=0.0),
    ]
    dice = np.random.default_rng(0)
    for n in range(num_ticks):
        for session in sessions:
            t = session.media_time
            session.push_audio(0.1 * dice.standard_normal(3200).astype(np.float32), t)
        sessions[0].push_text("hi")
        runtime.run_ticks(1)
        said += [plain(out) for session in sessions for out in session.poll()]
        if n == 1:
            sessions[0].interrupt(sessions[0].media_time - 0.3)
        if n == 2:
            sessions[0].pause()
            runtime.run_ticks(1)
            sessions[0].resume()
            sessions[1].close()
            runtime.run_ticks(2)
            sessions[1] = runtime.open_session(seed=3)
    return [*said, *(vars(session.stats).copy() for session in sessions)]


def plain(out: Any) -> dict[str, Any]:
    """An output as values that compare."""
    fields = vars(out) | {"kind": type(out).__name__}
    return {name: x.tobytes() if isinstance(x, np.ndarray) else x for name, x in fields.items()}


def runtime_of(model: InteractionModel) -> Runtime:
    return Runtime(model, num_slots=2, realtime=False, budget=BUDGET)


def led_runtime(rank: int, num_ranks: int, init_method: str) -> list[Any] | int:
    model = InteractionModel.random(
        ModelConfig.preset("tiny"), ranks=join(rank, num_ranks, init_method)
    )
    if rank > 0:
        return follow(model)
    with LeadModel(model) as leader, runtime_of(leader) as runtime:
        runtime.run_ticks(2)  # nobody is there yet
        return converse(runtime, 4)


def refused_alone(rank: int, num_ranks: int, init_method: str) -> dict[str, str] | int:
    """What each of these raises on rank 0, between two ticks that all ranks run."""
    os.environ["TML_CHECK_RANKS"] = "1"
    model = InteractionModel.random(CONFIG, ranks=join(rank, num_ranks, init_method))
    if rank > 0:
        return follow(model)
    with LeadModel(model) as leader:
        state = new_state(leader)
        leader.tick(state, tick_of(0, [0, 1]))
        bad = replace(tick_of(1, [0]), slot_S=torch.tensor([9], dtype=torch.int32))
        tries = {
            "forward": lambda: leader.forward(leader.embed_text([1])),
            "packed": lambda: leader.packed(rest="fp8"),
            "state.load": lambda: state.load(0, "session"),
            "cache.save": lambda: state.cache.save(state.session(0), "session"),
            "cache.commit": lambda: state.cache.commit(state.session(0)),
            "tick of a state of another model": lambda: leader.tick(
                new_state(model), tick_of(1, [0])
            ),
            "tick with a bad slot": lambda: leader.tick(state, bad),
            "rewind to nowhere": lambda: state.cache.rewind(state.session(0), 3),
            "a seed that is no JSON": lambda: state.set_sampling(1, seed=np.int64(7)),
            "logits of another width": lambda: leader.logits(torch.zeros(3, CONFIG.width + 1)),
            "logits of another dtype": lambda: leader.logits(
                torch.zeros(3, CONFIG.width, dtype=torch.float64)
            ),
        }
        raised = {name: type(_error_of(attempt)).__name__ for name, attempt in tries.items()}
        leader.tick(state, tick_of(1, [0, 1, 2]))
    return raised


def _error_of(attempt: Callable[[], Any]) -> Exception | None:
    try:
        attempt()
    except Exception as error:
        return error
    return None


def in_real_time(rank: int, num_ranks: int, init_method: str) -> tuple[bool, int] | int:
    """The tick thread runs the collectives: idle ticks, then those of a session."""
    model = InteractionModel.random(CONFIG, ranks=join(rank, num_ranks, init_method))
    if rank > 0:
        return follow(model)
    waited = threading.Event()
    with LeadModel(model) as leader:
        whole_tick, seen = leader.tick, []

        def tick(state: ModelState, given: TickInput) -> Any:
            out = whole_tick(state, given)
            seen.append(given)
            if len(seen) == 6:  # the warm-up and some of a session
                waited.set()
            return out

        leader.tick = tick  # type: ignore[method-assign]
        with Runtime(leader, num_slots=2, budget=BUDGET) as runtime:
            while runtime.media_ns() < 500_000_000:
                waited.wait(0.05)
            with runtime.open_session(seed=1) as session:
                came = waited.wait(60.0)
                runtime.check_alive()
                return came and session.media_time > 0.0, len(seen)


def dying_follower(rank: int, num_ranks: int, init_method: str) -> str:
    """Rank 1 ends without a word in its third tick; rank 0's clients hear why."""
    ranks = join(rank, num_ranks, init_method, timeout_s=5.0)
    model = InteractionModel.random(CONFIG, ranks=ranks)
    if rank > 0:
        whole_tick, seen = model.tick, []

        def tick(state: ModelState, given: TickInput) -> Any:
            seen.append(given)
            if rank == 1 and len(seen) == 3:
                os._exit(7)
            return whole_tick(state, given)

        model.tick = tick  # type: ignore[method-assign]
        follow(model)
    with LeadModel(model) as leader, runtime_of(leader) as runtime:
        session = runtime.open_session(seed=1)
        try:
            runtime.run_ticks(5)
        except LoopFailed as error:
            cause = error.__cause__
            try:
                session.push_text("are you there?")
            except LoopFailed:
                return f"{type(cause).__name__}: {cause}"
    return "nothing was raised"


def dying_leader(rank: int, num_ranks: int, init_method: str) -> int:
    ranks = join(rank, num_ranks, init_method, timeout_s=5.0)
    model = InteractionModel.random(CONFIG, ranks=ranks)
    if rank > 0:
        return follow(model)
    leader = LeadModel(model)
    leader.tick(new_state(leader), tick_of(0, [0, 1, 2]))
    os._exit(7)


def silent_leader(rank: int, num_ranks: int, init_method: str) -> int:
    """It lives, and neither ticks nor keeps alive."""
    ranks = join(rank, num_ranks, init_method, timeout_s=1.0)
    model = InteractionModel.random(CONFIG, ranks=ranks)
    if rank > 0:
        return follow(model)
    LeadModel(model)
    time.sleep(4.0)
    return 0


def other_arguments(rank: int, num_ranks: int, init_method: str, what: str) -> None:
    ranks = join(rank, num_ranks, init_method)
    config = CONFIG
    options: dict[str, Any] = {}
    if rank == 1:
        config = replace(CONFIG, norm_eps=1e-5) if what == "norm_eps" else CONFIG
        options = {"seed": 9} if what == "seed" else {}
    InteractionModel.random(config, ranks=ranks, **options)


def other_draws(rank: int, num_ranks: int, init_method: str) -> int:
    """A follower whose session draws from another seed than the leader said."""
    os.environ["TML_CHECK_RANKS"] = "1"
    model = InteractionModel.random(CONFIG, ranks=join(rank, num_ranks, init_method))
    if rank > 0:
        make = model.new_state

        def new(num_slots: int, **options: Any) -> ModelState:
            state = make(num_slots, **options)
            object.__setattr__(state, "set_sampling", lambda slot, **_: None)
            return state

        model.new_state = new  # type: ignore[method-assign]
        return follow(model)
    with LeadModel(model) as leader:
        leader.tick(new_state(leader), tick_of(0, [0, 1, 2]))
    return 0


def uneven(rank: int, num_ranks: int, init_method: str, changes: dict[str, Any]) -> None:
    ranks = join(rank, num_ranks, init_method)
    InteractionModel.random(replace(CONFIG, **changes), ranks=ranks)


def broadcasts(rank: int, num_ranks: int, init_method: str) -> tuple[list[int], list[int]]:
    """Checksums of what arrived, and how many broadcasts each took."""
    ranks = join(rank, num_ranks, init_method)
    first, whole, sent = FIRST_BLOCK - HEAD, dist.broadcast, []

    def broadcast(*args: Any, **options: Any) -> Any:
        sent[-1] += 1
        return whole(*args, **options)

    dist.broadcast = broadcast
    arrived = []
    try:
        for size in (
            0,
            1,
            first,
            first + 1,
            first + 1,
            100_000,
            99_999,
            *[3 * LARGEST_BLOCK] * 2,
            5,
        ):
            message = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
            sent.append(0)
            got = ranks.broadcast(message if rank == 0 else None)
            np.testing.assert_array_equal(got, message)
            arrived.append(zlib.crc32(got.tobytes()))
    finally:
        dist.broadcast = whole
    return arrived, sent


def two_models(rank: int, num_ranks: int, init_method: str) -> tuple[int, int, list[Any]]:
    """Four ranks, two models of two ranks each, which need not do the same."""
    ranks = join(rank, num_ranks, init_method, tensor=2)
    model = InteractionModel.random(CONFIG, ranks=ranks, seed=ranks.replica)
    return ranks.replica, ranks.rank, talk(model, 2 + ranks.replica)


def counted(rank: int, num_ranks: int, init_method: str, num_sessions: int) -> tuple[int, int, int]:
    """Of a tick: bytes received and gathers as torch was asked for them; tokens prefilled."""
    model = InteractionModel.random(CONFIG, ranks=join(rank, num_ranks, init_method))
    state = new_state(model, 3)
    received, before = [], [state.length(slot) for slot in range(3)]
    whole = dist.all_gather_into_tensor

    def gather(out: torch.Tensor, x: torch.Tensor, **options: Any) -> Any:
        received.append(out.nbytes - x.nbytes)
        return whole(out, x, **options)

    dist.all_gather_into_tensor = gather
    try:
        model.tick(state, tick_of(0, list(range(num_sessions))))
    finally:
        dist.all_gather_into_tensor = whole
    appended = sum(state.length(slot) - before[slot] for slot in range(num_sessions))
    return sum(received), len(received), appended - num_sessions * (CONFIG.layout.num_steps - 1)


def on_gpus(rank: int, num_ranks: int, init_method: str, mode: str) -> list[Any] | int:
    """bfloat16, a GPU for each rank, rank 0 leads; with one rank alone."""
    device = f"cuda:{rank}"
    ranks = join(rank, num_ranks, init_method, device=device) if num_ranks > 1 else None
    model = InteractionModel.random(CONFIG, ranks=ranks, device=device, dtype=torch.bfloat16)
    if rank > 0:
        return follow(model)
    if ranks is None:
        return talk(model, 6, mode=mode)
    with LeadModel(model) as leader:
        return talk(leader, 6, mode=mode)


def captured_gather(rank: int, num_ranks: int, init_method: str) -> bool:
    """A gather in a CUDA graph, replayed on new values of the same tensor."""
    device = f"cuda:{rank}"
    ranks = join(rank, num_ranks, init_method, device=device)
    x_T_W = torch.zeros(3, 64, device=device, dtype=torch.bfloat16)
    ranks.gather(x_T_W)  # the communicator is made by the first call
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out_T_W = ranks.gather(x_T_W)
    for value in (1.0, 2.0):
        x_T_W.fill_(value + rank)
        graph.replay()
        torch.cuda.synchronize()
        wanted = torch.arange(num_ranks, device=device).repeat_interleave(64) + value
        if not torch.equal(out_T_W.float(), wanted.expand(3, -1)):
            return False
    return True


def shard(rank: int, num_ranks: int, init_method: str, host: str, port: int) -> str:
    """A runtime of its own on every rank; rank 1 ends once it has a session."""
    store = dist.TCPStore(host, port, is_master=False)
    model = InteractionModel.random(CONFIG, seed=rank)
    with runtime_of(model) as runtime:
        session = None
        in_use = partial(sessions_of, runtime)
        with Shard(store, rank, address=f"rank {rank}", capacity=2, in_use=in_use, period_s=0.05):
            while not store.check(["over"]):
                if session is None and store.check([f"open/{rank}"]):
                    session = runtime.open_session(seed=1)
                    store.set(f"opened/{rank}", "1")
                if rank == 1 and store.check(["die"]):
                    os._exit(7)
                runtime.run_ticks(1)
        return "" if session is None else repr(session.poll() is not None)
