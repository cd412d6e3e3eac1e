"""InteractionModel: one set of weights that listens, watches, reads, speaks and acts in ticks."""

# Dimension key: T tokens, S session rows, D model width, V vocabulary, B mel bands.

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tml_kernels._dims import Dims
from tml_kernels.kv_cache import PageClass
from tml_kernels.precision import ACTIVATIONS

from ..errors import InputTypeError, InputValueError
from .backbone import Backbone
from .config import ModelConfig
from .converted import ConvertedModel
from .device_tick import DeviceTick, DirectRunner
from .frontend import Frontend
from .full import full_forward
from .load import WeightReport, load_weights, random_weights
from .output import TickOutput
from .packing import Packing, pack_weights
from .parts import KvBudget
from .replay import PastTick, replay_tick
from .state import ModelState
from .tick import run_tick
from .tick_input import TickInput, check_ids
from .weights import ModelWeights

if TYPE_CHECKING:
    from ..parallel.ranks import Ranks


class InteractionModel:
    """Weights and the functions on them. Sessions live in a `ModelState`, which callers hold.

    For inference: run under `torch.no_grad()` or `torch.inference_mode()`. With the same weights,
    seeds and input every output is bitwise the same, run after run, and a session's does not depend
    on the other sessions of a call.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: ModelWeights,
        report: WeightReport,
        ranks: Ranks | None = None,
    ) -> None:
        """ranks: that run the model together; config is the whole model's and weights this rank's
        share, as `random` and `load` make them."""
        self.config = config if ranks is None else ranks.share_config(config)
        self.ranks = ranks
        self.weights = weights
        self.report = report  # which weights were loaded and which are random
        self.dtype = weights.embed_V_D.dtype
        self.device = weights.embed_V_D.device
        self.backbone = Backbone(self.config, weights, ranks)
        self.frontend = Frontend(self.config, weights)
        self.device_tick = DeviceTick(self.backbone, self.frontend)

    @classmethod
    def random(
        cls,
        config: ModelConfig,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        experts: str | None = None,
        rest: str | None = None,
        search: bool = False,
        ranks: Ranks | None = None,
        distinct_experts: int | None = None,
    ) -> InteractionModel:
        """Random weights, the same ones for a seed. They say nothing sensible, at full speed.

        experts, rest, search: what `packed` takes. The model is bitwise the one that it would make,
        but of what is packed only one layer at a time, and of its routed experts a few, are ever
        there in plain form. ranks: that share the model, each of which calls this with the same
        arguments (docs/parallel.md); the others' shares, too, are here one layer at a time only.
        distinct_experts: how many of a layer's routed experts are drawn and packed, the first of
        them; the others are these with their rows moved, in bytes of their own, so that a model as
        large as a GPU is there in seconds and is as much work. Raises RanksDiffer, and
        InputValueError for sizes that the ranks cannot share.
        """
        packing = Packing(experts, rest, search)
        _check_dtype(dtype)
        if ranks is not None:
            ranks.check_config(config, seed=seed, dtype=dtype, packing=packing)
        weights, report = random_weights(
            config,
            seed=seed,
            device=device,
            dtype=dtype,
            packing=packing,
            ranks=ranks,
            distinct_experts=distinct_experts,
        )
        return cls(config, weights, report, ranks)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        config: ModelConfig | None = None,
        seed: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        experts: str | None = None,
        rest: str | None = None,
        search: bool = False,
        ranks: Ranks | None = None,
        verify: bool = False,
    ) -> InteractionModel:
        """Weights of a safetensors checkpoint in the published layout, see `load_weights`, or a
        folder that `convert_checkpoint` wrote.

        `report.random` names what the checkpoint lacks and `seed`, by default 0, made up. dtype: by
        default float32. experts, rest, search, ranks: as in `random`. Raises CheckpointError.

        A converted folder needs none of the arguments but `device` and `ranks`, and is refused
        where another one is given and it holds something else. Sizes, names, dtypes and shapes are
        always checked; verify: checksums too, which reads every byte once more.
        """
        converted = ConvertedModel.open(path)
        if converted is None:
            packing, seed = Packing(experts, rest, search), seed or 0
            if config is None:
                raise InputTypeError(f"config: {path} is no converted model, so it needs one")
        else:
            asked = {"seed": seed, "dtype": dtype, "experts": experts, "rest": rest}
            converted.check(config, search=search, **asked)
            found = converted.manifest
            config, dtype = found.config, found.dtype
            packing, seed = found.packing, found.report.seed
        dtype = torch.float32 if dtype is None else dtype
        _check_dtype(dtype)
        if ranks is not None:
            ranks.check_config(config, seed=seed, dtype=dtype, packing=packing)
        if converted is None:
            weights, report = load_weights(
                path, config, seed=seed, device=device, dtype=dtype, packing=packing, ranks=ranks
            )
        else:
            if verify:
                converted.verify()
            weights, report = converted.weights(device, ranks), converted.manifest.report
        return cls(config, weights, report, ranks)

    def packed(
        self, *, experts: str | None = None, rest: str | None = None, search: bool = False
    ) -> InteractionModel:
        """The same model with matrices rounded to fewer bits; this one stays as it is.

        experts: of the routed experts: fp8, fp8_channel, int4, int4_f16, mxfp4 or nvfp4. rest: of
        shared experts, attention projections, dense layers and the unembedding: fp8, fp8_channel,
        int4 or int4_f16. None: as they are. search: int4 scales take, of a few for each group of
        columns, the one with the least error; packing takes longer, the packed form is the same.
        Router gates, norms, convolutions, relative positions, embeddings, front ends and the speech
        head are never rounded: both models share them.

        Takes the memory of the packed matrices beside this model's; `random` and `load` pack while
        they fill, which never takes more than the packed model and, of one layer in plain form, a
        few routed experts and the rest.
        `forward` multiplies by the packed matrices' exact values. On a CPU, and in float32, every
        call decodes what it reads: that saves memory and no time. Raises ValueError for any other
        name, for a search where nothing is int4, for a float16 model, and for what is packed or
        shared with other ranks already.
        """
        self._check_whole("packed")
        weights = pack_weights(self.weights, Packing(experts, rest, search))
        return InteractionModel(self.config, weights, self.report)

    def new_state(
        self,
        num_slots: int,
        *,
        budget: KvBudget | None = None,
        max_append: int | None = None,
        page_dtype: torch.dtype | None = None,
        global_pages: int | None = None,
        drafts: bool = False,
    ) -> ModelState:
        """State of `num_slots` sessions, allocated here and never again.

        budget: what a session's global layers keep of each class of tokens. max_append: the longest
        block that `append` takes in one pass over the layers, by default the longest tick.
        page_dtype: of keys and values, by default the model's; float8_e4m3fn takes half of
        bfloat16. global_pages: of all sessions' global layers, by default as their budgets need.
        drafts: ticks draft output steps with the model's multi-token-prediction layers and say the
        same in fewer passes where these are right (docs/design.md). Raises InputValueError for a
        model that lacks them, a layout with too few or too many steps, and ranks, which do not
        share them.
        """
        if drafts and self.ranks is not None:
            raise InputValueError(
                f"drafts: this model is shared by {self.ranks.size} ranks, which do not share "
                "multi-token-prediction layers; use no drafts, or one rank"
            )
        longest = self.config.layout.max_tokens_per_tick
        return ModelState.new(
            self.config,
            num_slots,
            budget=KvBudget() if budget is None else budget,
            max_append=longest if max_append is None else max_append,
            device=self.device,
            dtype=self.dtype,
            page_dtype=self.dtype if page_dtype is None else page_dtype,
            global_pages=global_pages,
            drafts=drafts,
        )

    def embed_text(self, ids: Sequence[int]) -> Tensor:
        """[T, D] of token ids. Raises TypeError or ValueError for what is no token."""
        check_ids(self.config, "ids", ids)
        ids_T = torch.tensor(list(ids), dtype=torch.int64, device=self.device)
        return self.frontend.embed_text(ids_T)

    def embed_levels(self, levels_T_B: Tensor) -> Tensor:
        """[T, D] of dMel frames given as uint8 levels [T, B]."""
        return self.frontend.embed_levels(levels_T_B)

    def embed_frames(self, frames_N_L_Y_X_3: Tensor) -> Tensor:
        """[T, D] of uint8 RGB frame groups [N, frames, height, width, 3]."""
        return self.frontend.embed_frames(frames_N_L_Y_X_3)

    def append(
        self,
        state: ModelState,
        x_T_D: Tensor,
        start_S1: Tensor,
        slot_S: Tensor,
        page_class: PageClass = PageClass.TEXT,
        *,
        between_ticks: bool = False,
    ) -> Tensor:
        """Final-norm hidden states [T, D] of new tokens of any sessions; see `Backbone.append`."""
        return self.backbone.append(
            state, x_T_D, start_S1, slot_S, page_class, between_ticks=between_ticks
        )

    def logits(self, h_T_D: Tensor) -> Tensor:
        """float32 [T, V] of final-norm hidden states; columns that are no token are -inf."""
        return self.backbone.logits(h_T_D)

    def forward(self, x_T_D: Tensor, *, dropped_T_T: Tensor | None = None) -> Tensor:
        """float32 logits [T, V] of one whole sequence of embedded tokens, without state.

        A second path that shares only the weights with `append` and `logits`; see `full_forward`.
        Raises ValueError where other ranks hold some of them.
        """
        self._check_whole("forward")
        Dims(D=self.config.width).check(x_T_D=x_T_D, dtype=ACTIVATIONS, device=self.device)
        return full_forward(self.config, self.weights, x_T_D, dropped_T_T=dropped_T_T)

    def tick(self, state: ModelState, tick: TickInput) -> TickOutput:
        """Hear, see and read one tick of every live row, then speak it in K output steps.

        Raises TypeError or ValueError before anything is changed; whatever else raises, the
        sessions are as they were. A session with samples that are not finite is reported in
        `fault_S` and harms no other, and so is one that finds no room for its keys.
        """
        runner = state.buffers.runner or DirectRunner(self.device_tick, state)
        return run_tick(state, tick, runner)

    def replay(
        self, state: ModelState, slot: int, position: int, past: Sequence[PastTick]
    ) -> list[int]:
        """Rewind a slot to `position`, then let `past` happen to it: it hears that and says that.

        For speech that was never heard: with silence in its place, the session remembers what its
        user does, and goes on hearing what was heard meanwhile. Every tick is one pass over the
        layers. Returns the position after each. The count of draws stands where the ticks end that
        are replayed, so none is used twice while as many ticks are replayed as were rewound.
        Raises CacheError: with nothing changed when the rewind cannot be done (NoSnapshot,
        WindowPassed), else with the ticks before replayed.
        """
        state.bring_back(slot)
        state.cache.rewind(state.session(slot), position)
        ends = []
        for ago, tick in zip(reversed(range(len(past))), past, strict=True):
            replay_tick(self.backbone, self.frontend, state, slot, tick, ago)
            ends.append(state.length(slot))
        return ends

    def read(
        self,
        state: ModelState,
        slot: int,
        ids: Sequence[int],
        page_class: PageClass = PageClass.ANCHOR,
    ) -> None:
        """A slot reads token ids and says nothing: a prompt, by default one it never forgets.

        Raises TypeError or ValueError for what is no token, CacheError where there is no room.
        """
        x_T_D = self.embed_text(ids)
        start_S1 = torch.tensor([0, len(ids)], dtype=torch.int32, device=self.device)
        slot_S = torch.tensor([slot], dtype=torch.int32, device=self.device)
        self.append(state, x_T_D, start_S1, slot_S, page_class, between_ticks=True)

    def _check_whole(self, verb: str) -> None:
        if self.ranks is not None:
            raise ValueError(
                f"{verb}: this model is one of {self.ranks.size} ranks' shares; use a whole one, "
                "or give `experts` and `rest` when it is made"
            )


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in ACTIVATIONS:
        raise TypeError(f"dtype: expected float32, bfloat16 or float16, got {dtype}")
