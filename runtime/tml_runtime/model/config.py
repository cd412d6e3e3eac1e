"""The shape of an interaction model. Every number of the published backbone is a field here."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass, replace
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from tml_kernels.ops.patch_embed import PATCH_40, PatchSpec

from ..errors import InputValueError
from .layout import TurnLayout

CONV_TAPS = 3  # tokens before the current one that a convolution of four taps sees


@dataclass(frozen=True)
class HeadSpec:
    """Attention heads of one layer group, and how far back they look (in tokens)."""

    num_heads: int
    num_kv_heads: int
    head_width: int
    extent: int  # distances 0..extent-1 have a learned bias; beyond it the bias is zero
    window: int | None = None  # keys at distance >= window are masked; None: a global layer

    def __post_init__(self) -> None:
        _check_positive(self, "num_heads", "num_kv_heads", "head_width", "extent")
        if self.window is not None:
            _check_positive(self, "window")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}"
            )

    @property
    def kv_width(self) -> int:
        return self.num_kv_heads * self.head_width

    def qkvr_width(self, d_rel: int) -> int:
        """Rows of the fused projection: queries, keys, values and relative states."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_width + self.num_heads * d_rel


@dataclass(frozen=True)
class ExpertSpec:
    """Routed and shared experts of a sparse layer."""

    num_experts: int
    top_k: int
    num_shared: int
    width: int
    route_scale: float

    def __post_init__(self) -> None:
        _check_positive(self, "num_experts", "top_k", "num_shared", "width", "route_scale")
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k={self.top_k} is over num_experts={self.num_experts}")


@dataclass(frozen=True)
class FlowSpec:
    """The speech head: an AdaLN MLP that is integrated in `num_steps` Euler steps."""

    width: int
    depth: int
    num_steps: int
    guidance: float = 1.0  # 1: no classifier-free guidance

    def __post_init__(self) -> None:
        _check_positive(self, "width", "depth", "num_steps")
        if self.width % 2:
            raise ValueError(f"FlowSpec: width={self.width} is odd; half are cosines, half sines")
        if not 0.0 <= self.guidance < float("inf"):
            raise ValueError(f"guidance={self.guidance} is not a finite number >= 0")


@dataclass(frozen=True)
class Vocabulary:
    """Rows of the embedding, how many of them are tokens, and the ids with a meaning of their own.

    silence: nothing to say in this step. missing: put before a tick's text when audio was lost.
    delegate: hand the conversation to the background model. yield_turn: the floor is the user's.
    """

    size: int
    num_valid: int
    silence: int
    missing: int
    delegate: int
    yield_turn: int

    def __post_init__(self) -> None:
        if not 1 <= self.num_valid <= self.size:
            raise ValueError(f"num_valid={self.num_valid} is not in 1..size={self.size}")
        named = self.specials
        for name, token in named.items():
            if not 0 <= token < self.num_valid:
                raise ValueError(f"{name}={token} is not a token: num_valid={self.num_valid}")
        if len(set(named.values())) < len(named):
            raise ValueError(f"special tokens share an id: {named}")

    @property
    def specials(self) -> dict[str, int]:
        names = ("silence", "missing", "delegate", "yield_turn")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class ModelConfig:
    """A backbone with its front ends, heads and turn layout. Checked when it is made."""

    name: str
    width: int
    num_layers: int
    local_heads: HeadSpec
    global_heads: HeadSpec
    global_layers: tuple[int, ...]
    d_rel: int
    dense_layers: tuple[int, ...]
    dense_width: int
    experts: ExpertSpec
    vocab: Vocabulary
    logits_divisor: float
    patch: PatchSpec
    flow: FlowSpec
    tau_floor: int | None = None  # position from which global logits grow by 1 + alpha ln(n/floor)
    tau_alpha: float = 0.1
    norm_eps: float = 1e-6
    layout: TurnLayout = field(default_factory=TurnLayout)
    mtp_layers: tuple[str, ...] = ()  # that draft, "local" or "global" each; see MTP_LAYERS

    @classmethod
    def preset(cls, name: str, *, layout: TurnLayout | None = None) -> ModelConfig:
        """tiny, cue, slice or inkling-small, with the given turn layout (default: ms200)."""
        if name not in _PRESETS:
            raise ValueError(f"model {name!r} is not one of {', '.join(_PRESETS)}")
        return _PRESETS[name] if layout is None else replace(_PRESETS[name], layout=layout)

    def __post_init__(self) -> None:
        _check_positive(self, "width", "num_layers", "d_rel", "dense_width", "logits_divisor")
        _check_positive(self, "norm_eps")
        for name in ("global_layers", "dense_layers"):
            layers = getattr(self, name)
            if list(layers) != sorted(set(layers)) or not set(layers) <= set(self.layers):
                raise ValueError(
                    f"{name}={layers} is not ascending layer ids below {self.num_layers}"
                )
        if self.local_heads.window is None:
            raise ValueError("local_heads.window is None: a local layer needs a window")
        if self.global_heads.window is not None:
            raise ValueError(f"global_heads.window={self.global_heads.window} must be None")
        if self.tau_floor is not None:
            _check_positive(self, "tau_floor")
        if self.tau_alpha < 0:
            raise ValueError(f"tau_alpha={self.tau_alpha} is negative")
        if not set(self.mtp_layers) <= {"local", "global"}:
            raise ValueError(f"mtp_layers={self.mtp_layers}: expected 'local' or 'global' of each")

    @property
    def layers(self) -> range:
        return range(self.num_layers)

    def heads(self, layer: int) -> HeadSpec:
        return self.global_heads if layer in self.global_layers else self.local_heads

    def is_dense(self, layer: int) -> bool:
        return layer in self.dense_layers

    @property
    def mtp_blocks(self) -> ModelConfig:
        """The blocks of the multi-token-prediction layers, as the layers of a model: all dense.

        Raises ValueError where there are none.
        """
        kinds = self.mtp_layers
        return replace(
            self,
            num_layers=len(kinds),
            global_layers=tuple(i for i, kind in enumerate(kinds) if kind == "global"),
            dense_layers=tuple(range(len(kinds))),
            mtp_layers=(),
        )

    @property
    def num_drafts(self) -> int:
        """Steps that a tick drafts, by as many multi-token-prediction layers: all but the first
        two, whose inputs are known by then. Raises InputValueError where a tick cannot draft."""
        drafts, layers = self.layout.num_steps - 2, len(self.mtp_layers)
        if not 1 <= drafts < CONV_TAPS:
            raise InputValueError(
                f"drafts: num_steps={self.layout.num_steps} of the layout, and a tick drafts where "
                f"there are 3..{CONV_TAPS + 1}; use no drafts"
            )
        if layers < drafts:
            raise InputValueError(
                f"drafts: model {self.name!r} has {layers} multi-token-prediction layers, and a "
                f"tick drafts with {drafts}; load it with mtp_layers=MTP_LAYERS[:{drafts}], or use "
                "no drafts"
            )
        return drafts

    def with_drafts(self, num_drafts: int) -> ModelConfig:
        """The model with its first multi-token-prediction layers behind its own, as more layers."""
        kinds = self.mtp_layers[:num_drafts]
        behind = range(self.num_layers, self.num_layers + len(kinds))
        more = tuple(i for i, kind in zip(behind, kinds, strict=True) if kind == "global")
        return replace(
            self,
            num_layers=behind.stop,
            global_layers=(*self.global_layers, *more),
            dense_layers=(*self.dense_layers, *behind),
            mtp_layers=(),
        )


def _check_positive(spec: object, *names: str) -> None:
    for name in names:
        value = getattr(spec, name)
        if not value > 0:
            raise ValueError(f"{type(spec).__name__}: {name}={value} is not positive")


def from_data(kind: Any, data: Any, name: str) -> Any:
    """A value of `kind`, such as ModelConfig, from what JSON made of its `asdict`.

    kind: a dataclass, tuple, dict, number, string or None; the items of a dict are not looked at.
    Raises ValueError for a field that is missing, unknown, of another type, or refused.
    """
    if is_dataclass(kind):
        names = [spec.name for spec in fields(kind)]
        if not isinstance(data, dict) or sorted(data) != sorted(names):
            raise ValueError(f"{name}: expected the fields {', '.join(names)}, got {data!r:.100}")
        hints = get_type_hints(kind)
        return kind(**{n: from_data(hints[n], data[n], f"{name}.{n}") for n in names})  # type: ignore
    if get_origin(kind) is tuple and isinstance(data, list):
        items = get_args(kind)
        if items[-1] is not ... and len(data) != len(items):
            raise ValueError(f"{name}: expected {len(items)} items, got {data!r:.100}")
        return tuple(from_data(items[0], item, name) for item in data)
    allowed = get_args(kind) if isinstance(kind, UnionType) else (get_origin(kind) or kind,)
    if type(data) in allowed or (float in allowed and type(data) is int):
        return data
    raise ValueError(f"{name}: expected {kind}, got {data!r:.100}")


# Those of the published checkpoints. A model may have the first few of them:
# `replace(config, mtp_layers=MTP_LAYERS[:2])`.
MTP_LAYERS = ("local", "global", "local", "global", "local", "local", "local", "local")

# The ids of our special tokens lie in the published vocabulary's unused range.
_INKLING_SMALL = ModelConfig(
    name="inkling-small",
    width=4096,
    num_layers=42,
    local_heads=HeadSpec(num_heads=32, num_kv_heads=8, head_width=128, extent=512, window=512),
    global_heads=HeadSpec(num_heads=32, num_kv_heads=8, head_width=128, extent=1024),
    global_layers=(5, 11, 17, 23, 29, 35, 41),
    d_rel=16,
    dense_layers=(0, 1),
    dense_width=16_384,
    experts=ExpertSpec(num_experts=256, top_k=6, num_shared=2, width=2048, route_scale=8.0),
    vocab=Vocabulary(
        size=201_024,
        num_valid=200_058,
        silence=200_049,
        missing=200_050,
        delegate=200_051,
        yield_turn=200_052,
    ),
    logits_divisor=16.0,
    patch=PATCH_40,
    flow=FlowSpec(width=1024, depth=6, num_steps=4),
    tau_floor=128_000,
)

_PRESETS = {
    "inkling-small": _INKLING_SMALL,
    "slice": replace(
        _INKLING_SMALL, name="slice", num_layers=4, global_layers=(2,), dense_layers=(0,)
    ),
    "tiny": ModelConfig(
        name="tiny",
        width=128,
        num_layers=4,
        local_heads=HeadSpec(num_heads=4, num_kv_heads=2, head_width=64, extent=128, window=128),
        global_heads=HeadSpec(num_heads=4, num_kv_heads=2, head_width=64, extent=256),
        global_layers=(1, 3),
        d_rel=16,
        dense_layers=(0,),
        dense_width=256,
        experts=ExpertSpec(num_experts=8, top_k=2, num_shared=1, width=128, route_scale=2.5),
        vocab=Vocabulary(
            size=320, num_valid=260, silence=256, missing=257, delegate=258, yield_turn=259
        ),
        logits_divisor=1.0,
        patch=replace(PATCH_40, widths=(16, 32, 64)),
        flow=FlowSpec(width=128, depth=2, num_steps=4),
        tau_floor=128_000,
    ),
    # Small enough to train on a CPU; `tml_runtime.demo.cue` has its words, trainer and weights.
    "cue": ModelConfig(
        name="cue",
        width=128,
        num_layers=4,
        local_heads=HeadSpec(num_heads=4, num_kv_heads=2, head_width=32, extent=128, window=128),
        global_heads=HeadSpec(num_heads=4, num_kv_heads=2, head_width=32, extent=1024),
        global_layers=(1, 3),
        d_rel=16,
        dense_layers=(0,),
        dense_width=256,
        experts=ExpertSpec(num_experts=8, top_k=2, num_shared=1, width=128, route_scale=2.5),
        vocab=Vocabulary(size=64, num_valid=41, silence=0, missing=1, delegate=2, yield_turn=3),
        logits_divisor=1.0,
        patch=replace(PATCH_40, widths=(16, 32, 64)),
        flow=FlowSpec(width=128, depth=2, num_steps=4),
        tau_floor=128_000,
        layout=TurnLayout(max_video_tokens=1),  # it was trained on 40x40 alone
    ),
}
