"""A transformers Cache without layers: keys and values are in pages, and attention reads those."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

try:
    from transformers import Cache
except ImportError as error:
    raise ImportError(
        "TmlCache needs transformers' Cache: pip install 'transformers>=5.17'"
    ) from error


class LayerlessCache(Cache):
    """Answers what a model asks of its cache, but for its layers: whoever reads those would find
    none. windows: of every layer, None for full attention."""

    def __init__(self, windows: Sequence[int | None]) -> None:
        super().__init__(layers=[])
        self._windows = list(windows)

    @property
    def layers(self) -> list[Any]:
        raise _layers_refusal()

    @layers.setter
    def layers(self, layers: list[Any]) -> None:
        if layers:  # Cache's constructor sets an empty list
            raise _layers_refusal()

    def __len__(self) -> int:
        return len(self._windows)

    @property
    def batch_size(self) -> int:
        return -1

    @property
    def is_initialized(self) -> bool:
        return self.get_seq_length() > 0

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return True

    @property
    def is_sliding(self) -> list[bool]:
        return [window is not None for window in self._windows]

    @property
    def is_linear(self) -> list[bool]:
        return [False] * len(self)

    @property
    def is_dummy(self) -> list[bool]:
        return [False] * len(self)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of each row that were seen, the position of the next one: also those dropped."""
        return 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0


def _layers_refusal() -> NotImplementedError:
    return NotImplementedError(
        "TmlCache: the model reads the cache's layers itself, and there are none: keys and values "
        "are in pages, which attention alone reads"
    )
