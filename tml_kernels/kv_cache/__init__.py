"""A paged KV cache for sessions that last: fixed budgets, pages by class, snapshots and forks."""

try:
    from .._core import BudgetExceeded as BudgetExceeded
    from .._core import CacheError as CacheError
    from .._core import OutOfPages as OutOfPages
    from .._core import OutOfSessions as OutOfSessions
    from .._core import PageClass as PageClass
    from .._core import ReservationExceeded as ReservationExceeded
    from .._core import Session as Session
    from .._core import UnknownSession as UnknownSession
    from .._core import WindowPassed as WindowPassed
except ImportError as error:
    raise ImportError(
        "tml_kernels.kv_cache needs tml_kernels._core, which is not built here: install a C++ "
        "compiler (g++ or clang++) and run 'pip install .' again"
    ) from error

from .cache import CLASSES as CLASSES
from .cache import CacheStats as CacheStats
from .cache import RollingKVCache as RollingKVCache
from .cache import Rows as Rows
from .pools import CacheGroup as CacheGroup
from .pools import GroupPages as GroupPages
from .session_file import SessionFileError as SessionFileError
from .slot_state import NoSnapshot as NoSnapshot
from .slot_state import SlotTensor as SlotTensor
