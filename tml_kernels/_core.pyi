"""Host code of tml_kernels: how it was built, and the page table of the rolling cache."""

from collections.abc import Sequence
from typing import ClassVar, NamedTuple, TypedDict

from typing_extensions import Buffer

class BuildInfo(TypedDict):
    compiler: str  # the first line of its --version
    cxx_standard: int  # 201703
    build_type: str  # "release" or "debug"
    flags: str
    cuda_archs: list[str] | None  # what _cuda was built for in the same build, such as ["90a"]

def build_info() -> BuildInfo: ...

class CacheError(RuntimeError):
    """What a page table refuses; it has changed nothing then."""

class UnknownSession(CacheError):
    """The handle's session is closed, or never was."""

    slot: int
    epoch: int

class OutOfSessions(CacheError):
    max_sessions: int

class OutOfPages(CacheError):
    """`evictable` pages could be freed by roll(), and be used when the fence has passed."""

    group: int
    needed: int
    free: int
    evictable: int

class BudgetExceeded(CacheError):
    """More anchors than their budget, which no eviction enforces, or more pages than columns."""

    needed: int
    limit: int

class ReservationExceeded(CacheError):
    """`left` is the most tokens of this class that may still be appended."""

    tokens: int
    left: int

class WindowPassed(CacheError):
    """A rewind that needs keys which have left the window; to `oldest` it would be possible."""

    group: int
    position: int
    oldest: int

class PageClass:
    """What a page's tokens are; pages are evicted as video, audio, reply, text; anchors never."""

    ANCHOR: ClassVar[PageClass]
    TEXT: ClassVar[PageClass]
    AUDIO: ClassVar[PageClass]
    VIDEO: ClassVar[PageClass]
    REPLY: ClassVar[PageClass]
    def __init__(self, value: int) -> None: ...
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> int: ...

class LayerGroup:
    """The layers with one window and head shape: one page id serves all of them.

    pages: all of them, with the zero page 0; columns: the most pages of one session. Without a
    window a page's positions lie in base..base + span; span is 2048 unless given, and at least
    page_rows. With a window the pages are filled whatever the class and leave when the window has
    passed, but `history` positions later, so that a rewind can go back that far at least.
    """

    def __init__(
        self,
        *,
        pages: int,
        columns: int,
        page_rows: int = 64,
        window: int | None = None,
        history: int = 0,
        span: int | None = None,
    ) -> None: ...
    @property
    def pages(self) -> int: ...
    @property
    def columns(self) -> int: ...
    @property
    def page_rows(self) -> int: ...
    @property
    def window(self) -> int | None: ...
    @property
    def history(self) -> int: ...
    @property
    def span(self) -> int | None:
        """None with a window."""

class Session(NamedTuple):
    slot: int  # row of the device tables
    epoch: int  # how often the slot has been opened

class CopyCommand(NamedTuple):
    """Copy the first `rows` rows before the target is written to, or the source page reused."""

    group: int
    source: int
    target: int
    rows: int

class PageRef(NamedTuple):
    group: int
    page: int  # -1 while the session is suspended
    base: int
    used: int
    page_class: PageClass  # in a group with a window always TEXT

class PageImage(NamedTuple):
    group: int
    base: int
    used: int
    page_class: int  # PageClass.value
    positions: list[int]  # of the `used` rows

class SessionImage(NamedTuple):
    """A session without its pages' contents, in plain values that can be written to a file."""

    length: int
    mark: int | None
    priority: int
    budgets: list[int]  # [page class]
    rolled_to: list[int]  # [group]: positions below have left the window
    pages: list[PageImage]  # group by group, in the order of suspend() and resume()

class GroupStats(NamedTuple):
    pages: int  # = 1 + free + waiting + reserved + held
    free: int
    waiting: int  # behind the tick fence
    reserved: int
    held: int
    shared: int  # of those held: by several sessions

class SessionStats(NamedTuple):
    length: int
    priority: int
    in_transaction: bool
    suspended: bool
    pages: list[list[int]]  # [group][page class]

class PageTable:
    """Which page holds which tokens of which session: the host's side of the rolling cache.

    Bookkeeping only: the caller writes, copies and saves the pages' contents. Deterministic; for
    one thread. In a group without a window pages do not mix classes: every class has an open page,
    its newest while used < page_rows and length - base < span, which its next token goes to. A
    page's rows hold ascending positions, with gaps where the other classes' tokens are. With
    page_rows 4 and span 8, four ticks of 2 audio tokens and 1 of reply make pages of positions
    (0, 1, 3, 4), (6, 7, 9, 10) for audio and (2, 5, 8), (11) for reply: 11 lies at 2 + span. With a
    window they make (0..3), (4..7), (8..11).

    Every verb raises UnknownSession for a stale handle, RuntimeError when the session is not in the
    phase that the verb is for (at rest unless it says otherwise), and ValueError for a bad value;
    whatever raises has changed nothing. A page freed in tick n is used again from n + lag on, with
    lag 0 at once.
    """

    def __init__(self, groups: Sequence[LayerGroup], *, max_sessions: int, lag: int) -> None: ...
    def open(self, budgets: dict[PageClass, int], *, priority: int = 0) -> Session:
        """budgets: pages per class, all five of at least 1, in each group without a window.

        Raises OutOfSessions.
        """

    def close(self, session: Session) -> None:
        """In any phase."""

    def reserve(self, session: Session, runs: Sequence[tuple[PageClass, int]]) -> list[int]:
        """Begins a transaction: at most these tokens, in runs of one class, in their order.

        Returns the pages held ready per group: exactly what the full runs take, and fewer tokens
        never take more. Raises OutOfPages or BudgetExceeded.
        """

    def append(
        self, session: Session, page_class: PageClass, tokens: int, rows: Buffer, column: int = 0
    ) -> int:
        """In a transaction: where the tokens go; returns the first one's position.

        rows: int64, contiguous, [groups, T] with T >= column + tokens. Token i goes to row
        rows[g, column + i] of group g's pages laid end to end: page * page_rows + row in the page.
        The other columns are left as they are.

        Taken from the first run, not before the last one used, that has as many tokens left; the
        runs before it are given up. Raises ReservationExceeded.
        """

    def commit(self, session: Session) -> None:
        """Ends a transaction: rolls windows, evicts each class's oldest pages over its budget."""

    def roll_back(self, session: Session) -> None:
        """Ends a transaction: the session's pages and length are those before reserve()."""

    def reserve_all(
        self, sessions: Sequence[Session], page_classes: Sequence[PageClass], tokens: Buffer
    ) -> int:
        """`reserve` for one session after the other: tokens[s, r] of page_classes[r] is run r of
        session s. Stops at the first that is refused and returns its index, else how many there
        are.

        tokens: int64, contiguous, [sessions, runs]; so is `columns` below.
        """

    def append_all(
        self,
        sessions: Sequence[Session],
        page_classes: Sequence[PageClass],
        tokens: Buffer,
        columns: Buffer,
        rows: Buffer,
        positions: Buffer,
    ) -> None:
        """`append` for all runs of one session after the other, each from its own column on.

        positions: int64, contiguous, [T]: that of the token whose rows are rows[:, t]. What raises
        leaves the sessions before with their tokens: roll them back.
        """

    def commit_all(self, sessions: Sequence[Session]) -> None:
        """`commit` for each of them, given once; or for none, when one is in no transaction."""

    def roll(self, session: Session, group: int, pages: int) -> int:
        """Frees up to `pages` pages, by class and age; returns how many.

        Not anchors, no class's open page, none that another session shares. ValueError for a group
        with a window.
        """

    def evictable(self, session: Session, group: int) -> int:
        """The most pages that roll() would free; 0 in a transaction and with a window."""

    def mark(self, session: Session) -> int:
        """The length, for rewind(); replaces the mark before. A rewind below it drops it."""

    def rewind(self, session: Session, position: int | None = None) -> list[CopyCommand]:
        """Drops the tokens from `position` on, or from the mark.

        Pages that are open then are copied where they are shared. Raises WindowPassed, OutOfPages,
        or RuntimeError when there is no mark.
        """

    def fork(self, session: Session, *, priority: int = 0) -> tuple[Session, list[CopyCommand]]:
        """A session with the same tokens and budgets: shares its pages, copies the open ones.

        Raises OutOfSessions or OutOfPages.
        """

    def suspend(self, session: Session) -> list[PageRef]:
        """Frees the session's pages; save these before the fence lets them be reused."""

    def resume(self, session: Session) -> list[PageRef]:
        """When suspended: where to restore the saved pages, in suspend()'s order.

        Pages that were shared are its own then. Raises OutOfPages.
        """

    def image(self, session: Session) -> SessionImage:
        """At rest or suspended: what restore() needs. image(restore(x)) equals x."""

    def restore(self, image: SessionImage) -> Session:
        """A new, suspended session with these pages; resume() tells where their contents go.

        The image may come from anywhere, also as lists: everything is checked. Raises ValueError,
        or OutOfSessions.
        """

    def victim(self, session: Session) -> Session:
        """Who gives pages for `session`, in any phase; itself when there is no other.

        Of the sessions at rest with at most its priority the one of the lowest, then the one that
        committed last the longest ago.
        """

    def tick(self, n: int) -> None:
        """Begins tick n, greater than the last; pages whose fence has passed are free."""

    def place(
        self, rows: Buffer, positions: Buffer, placed_rows: Buffer, placed_positions: Buffer
    ) -> None:
        """Where the positions of a tick's tokens go, in one flat buffer of the rows of all groups
        without a window: row (-1 where a token has none) and position, T for each such group.

        All int64: rows [groups, T], positions [T], the other two [num_placed * T].
        """

    @property
    def num_placed(self) -> int:
        """Groups without a window."""

    def take_deltas(self, out: Buffer) -> int:
        """Writes what changed in the device tables since the last call; returns how many entries.

        out: int64, contiguous, of at least 4 * num_deltas: rows of (key, page, base, rows), each
        key once, and (-1, 0, 0, 0) in all rows behind them. The tables of all groups are flat
        buffers of num_keys entries: key is first_key(group) + slot * columns + index. Of the page
        its first `rows` rows hold tokens; with a window `rows` is always page_rows, and causality
        hides the rest. An entry that is not used is (key, -1, 0, 0).
        """

    def send_again(self) -> None:
        """Every entry counts as changed: for a device that may have missed what was taken."""

    @property
    def num_keys(self) -> int:
        """Entries of all device tables: the sum of max_sessions * columns."""

    def first_key(self, group: int) -> int: ...
    @property
    def num_deltas(self) -> int: ...
    def pages(self, session: Session, group: int) -> list[PageRef]:
        """As the device's table has them: without order."""

    def positions(self, session: Session, group: int) -> list[list[int]]:
        """Of every page's used rows, in the order of pages()."""

    def length(self, session: Session) -> int: ...
    def lengths(self) -> list[int]:
        """By slot, -1 of a closed one."""

    def held(self, sessions: Sequence[Session], group: int) -> list[int]:
        """Pages by class, of all of them together."""

    @property
    def dropped(self) -> list[list[int]]:
        """[group][page class]: pages that `roll` and `commit` took, since the beginning. What
        leaves a window is not counted."""

    def session_stats(self, session: Session) -> SessionStats: ...
    def stats(self) -> list[GroupStats]:
        """Per group. Counts every page: not for every tick."""

    @property
    def num_sessions(self) -> int:
        """Those open, suspended ones too."""

    @property
    def work(self) -> int:
        """Elementary changes since the beginning: what a tick costs, without a clock."""

    def check_invariants(self) -> None:
        """Raises RuntimeError if the table contradicts itself. Looks at everything."""
