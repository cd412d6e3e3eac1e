"""What takes say of a system: the metrics, each from the tasks that are a twin of its benchmark.

A word that is due in an episode's tick d is to begin when that tick has been heard: at the time
(d + 1) * period of the client's clock, on a line without delay.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tml_runtime.demo.cue.stage import CUE_HZ, Episode, Event
from tml_runtime.demo.cue.words import ID, NUMBERS, WORDS, YES

from .interaction_hear import first_sound, flash_frame, tone_begin
from .interaction_metrics import (
    MODEL_GAP_S,
    USER_GAP_S,
    Due,
    Span,
    Word,
    alert_scores,
    backchannels,
    counting,
    divergence,
    floor_s,
    match_due,
    mean,
    merge,
    pauc,
    quantiles,
    response_latencies,
    stop_latencies,
    takeover,
    takes_over,
    timing_accuracy,
)
from .interaction_take import PERIOD_S, RATE, Take
from .interaction_voice import speech

EARLY_S, LATE_S = PERIOD_S, 2 * PERIOD_S  # of a word due: its window
ANSWER_S = 2.0  # of a question that is answered by what is seen, unless the next is due before
ASKED_S = 3.0  # after a request, in which the turn is to be taken
HOLD_TICKS = 10  # of somebody who talks, in which nothing is due: the turn is not to be taken
YIELD_TICKS, HELD_TICKS = 2, 3

TIME_SET = ("wait_tone", "wait_flash", "every")
CUE_SET = ("cue", "ask", "count_tone", "count_flash", "count_motion")
COUNTS = ("count_tone", "count_flash", "count_motion")
SEEN = ("wait_flash", "count_flash", "count_motion")
HOLDS = ("cue", "every", "count_tone", "count_flash", "wait_tone", "wait_flash")
_SPEAK, _YES, _YIELD = ID["speak"], YES, "<yield>"

Figures = dict[str, Any]


@dataclass(frozen=True)
class Metric:
    """name: of a figure. unit: "%", "s", "1/s", "1/min" or "". up: more is better."""

    name: str
    unit: str
    up: bool
    about: str


METRICS = (
    Metric("takeover_rate", "%", True, "requests to speak after which it takes the turn"),
    Metric("takeover_latency_s", "s", False, "from the request to its first word, median"),
    Metric("false_takeover_rate", "%", False, "turns taken while somebody talks, nothing due"),
    Metric("stop_latency_s", "s", False, "overlap with who interrupts it, mean"),
    Metric("response_latency_s", "s", False, "from the interruption's end to its next speech"),
    Metric("yield_rate", "%", True, "interruptions with no word after two ticks"),
    Metric("held_rate", "%", True, "backchannels of the user that stop nothing"),
    Metric(
        "backchannel_rate_hz", "1/s", True, "short answers while the user talks, up to those due"
    ),
    Metric("backchannel_divergence", "", False, "of their times from those due"),
    Metric("false_alarms_per_minute", "1/min", False, "answers to no cue, while somebody talks"),
    Metric("count_nmae", "", False, "normalised error of counts"),
    Metric("count_off_by_one", "%", True, "counts right within one"),
    Metric("time_set_accuracy", "%", True, "words at set times: content and time"),
    Metric("cue_set_accuracy", "%", True, "words at a cue: content and time"),
    Metric("exact_tick", "%", True, "words in the very tick, on the tick grid"),
    Metric("pauc", "", True, "PAUC at omega 0.5 of what is seen; 0.25 is silence"),
    Metric("alert_hit", "%", True, "events seen that are told in time"),
    Metric("alert_precision", "%", True, "of what is told, in time"),
    Metric("speech_iou", "", True, "IoU of when it is to speak and does"),
    Metric("reaction_p50_s", "s", False, "from a cue to the first sample, p50"),
    Metric("reaction_p95_s", "s", False, "from a cue to the first sample, p95"),
    Metric("reaction_p99_s", "s", False, "from a cue to the first sample, p99"),
)


def figures(takes: Sequence[Take], *, on_grid: bool) -> Figures:
    """Every metric by name, shares from 0 to 1, None where its tasks were not played; floor_p50_s
    and the like beside the reaction's; and `of`, how many samples each group has. on_grid: the
    sound lies in windows as in the episode, so that a tick can be told. Raises MissingExtraError
    where "speak" was played."""
    by_task: dict[str, list[Take]] = defaultdict(list)
    for take in takes:
        by_task[take.episode.task].append(take)

    def of(*tasks: str) -> list[Take]:
        return [take for task in tasks for take in by_task[task]]

    parts = (
        _turns(of("speak"), of(*HOLDS)),
        _overlap(of("speak")),
        _backchannels(of("cue")),
        _counts(of(*COUNTS)),
        _timing(by_task, on_grid),
        _seen(of(*SEEN), of("speak")),
        _reaction(of("cue", "count_tone"), of("count_flash")),
    )
    result: Figures = {"of": {}}
    for part in parts:
        result["of"] |= part.pop("of")
        result |= part
    assert {metric.name for metric in METRICS} <= set(result)
    return result


# Turn-taking


def _turns(speaking: Sequence[Take], holding: Sequence[Take]) -> Figures:
    asked = [turn for take in speaking for turn in _requests(take)]
    held = [words for take in holding for words in _holds(take)]
    rate, latency_s = takeover(asked)
    return {
        "takeover_rate": rate,
        "takeover_latency_s": quantiles(latency_s)["p50"],
        "false_takeover_rate": mean(float(takes_over(words)) for words in held),
        "of": {"requests": len(asked), "holds": len(held)},
    }


def _requests(take: Take) -> Iterator[tuple[float, list[Word]]]:
    """When it was asked to speak, and its words until somebody interrupts, for ASKED_S at most."""
    stops = [e.tick * PERIOD_S for e in take.episode.events if e.kind == "interruption"]
    for tick, ids in enumerate(take.episode.text):
        if _SPEAK in ids:
            t = tick * PERIOD_S
            end = min([t + ASKED_S, *(stop for stop in stops if stop > t)])
            yield t, _between(take.words, t, end)


def _holds(take: Take) -> Iterator[list[Word]]:
    """Words where somebody talks for HOLD_TICKS and nothing is due."""
    episode = take.episode
    quiet_T = episode.speech_T & (episode.said_T == 0)
    edges = np.diff(np.concatenate([[False], quiet_T, [False]]).astype(int))
    begins, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
        if end - begin >= HOLD_TICKS:
            yield _between(take.words, (begin + 1) * PERIOD_S + LATE_S, (end + 1) * PERIOD_S)


# Overlap


def _overlap(takes: Sequence[Take]) -> Figures:
    stops: list[float] = []
    responses: list[float] = []
    yielded: list[bool] = []
    held: list[bool] = []
    voices = speech([take.episode.pcm_T_W.reshape(-1) for take in takes])
    for take, voice in zip(takes, voices, strict=True):
        model = merge(take.segments(), MODEL_GAP_S)
        for event in take.episode.events:
            if event.kind == "interruption":
                begin, end = event.tick * PERIOD_S, _asked_again(take.episode, event.tick)
                user = merge([s for s in voice if s[1] > begin and s[0] < end], USER_GAP_S)
                stops += stop_latencies(user, model)
                responses += response_latencies(user, model)
                spoken = _between(take.words, begin + (YIELD_TICKS + 1) * PERIOD_S, end)
                yielded.append(all(word.text == _YIELD for word in spoken))
            elif event.kind == "backchannel":
                held.append(_goes_on(take, event))
    return {
        "stop_latency_s": mean(stops),
        "response_latency_s": mean(responses),
        "yield_rate": mean(map(float, yielded)),
        "held_rate": mean(map(float, held)),
        "of": {"interruptions": len(yielded), "overlaps": len(stops), "user_noises": len(held)},
    }


def _asked_again(episode: Episode, tick: int) -> float:
    later = [at for at in range(tick, len(episode)) if episode.text[at]]
    return (min(later) if later else len(episode)) * PERIOD_S


def _goes_on(take: Take, event: Event) -> bool:
    """Whether it speaks without a pause in the ticks that heard a backchannel and the next two."""
    begin = (event.tick + 1) * PERIOD_S
    end = begin + HELD_TICKS * PERIOD_S
    near = [word for word in take.words if word.end > begin and word.start < end]
    spoken = merge(((word.start, word.end) for word in near if word.text != _YIELD), MODEL_GAP_S)
    yields = any(word.text == _YIELD for word in near)
    return not yields and any(s[0] < begin + PERIOD_S and s[1] > end - PERIOD_S for s in spoken)


# Backchannels


def _backchannels(takes: Sequence[Take]) -> Figures:
    said = [backchannels(take.segments(), take.words) for take in takes]
    due = [[(t, t + PERIOD_S) for t, _ in _due(take.episode)] for take in takes]
    alarms = sum(_false_alarms(take) for take in takes)
    minutes = sum(float(take.episode.speech_T.sum()) for take in takes) * PERIOD_S / 60
    return {
        "backchannel_rate_hz": mean(
            len(spans) / take.duration_s for spans, take in zip(said, takes, strict=True)
        ),
        "backchannel_due_hz": mean(
            len(spans) / take.duration_s for spans, take in zip(due, takes, strict=True)
        ),
        "backchannel_divergence": mean(
            divergence(ours, theirs, take.duration_s)
            for ours, theirs, take in zip(said, due, takes, strict=True)
        ),
        "false_alarms_per_minute": alarms / minutes if minutes > 0 else None,
        "of": {"backchannel_takes": len(takes)},
    }


def _false_alarms(take: Take) -> int:
    matched = match_due(_due(take.episode), take.words, early_s=EARLY_S, late_s=LATE_S)
    return len([word for word in take.words if word.text == _YES and word not in matched])


# Counting


def _counts(takes: Sequence[Take]) -> Figures:
    pairs = [
        (_last_number(take), event.word)
        for take in takes
        for event in take.episode.events
        if event.kind == "count"
    ]
    nmae, off_by_one = counting(pairs)
    return {"count_nmae": nmae, "count_off_by_one": off_by_one, "of": {"counts": len(pairs)}}


def _last_number(take: Take) -> int:
    """0 for who says none."""
    numbers = [NUMBERS.index(word.text) for word in sorted(take.words) if word.text in NUMBERS]
    return numbers[-1] if numbers else 0


# Timing


def _timing(by_task: dict[str, list[Take]], on_grid: bool) -> Figures:
    """Accuracies are means over tasks, so that none weighs more for having more events."""
    exact: list[float] = []
    num_due = 0

    def accuracy(task: str) -> float | None:
        nonlocal num_due
        hits: list[float] = []
        for take in by_task[task]:
            due = _due(take.episode)
            matched = match_due(due, take.words, early_s=EARLY_S, late_s=LATE_S)
            hits += [float(word is not None) for word in matched]
            share = timing_accuracy(due, take.words, early_s=0.001, late_s=0.001)
            exact.extend([] if share is None else [share] * len(due))
        num_due += len(hits)
        return mean(hits)

    time_set = mean(share for task in TIME_SET if (share := accuracy(task)) is not None)
    cue_set = mean(share for task in CUE_SET if (share := accuracy(task)) is not None)
    return {
        "time_set_accuracy": time_set,
        "cue_set_accuracy": cue_set,
        "exact_tick": mean(exact) if on_grid else None,
        "of": {"due": num_due},
    }


def _due(episode: Episode) -> list[Due]:
    return [
        Due((event.tick + 1) * PERIOD_S, WORDS[event.word])
        for event in episode.events
        if event.kind == "due"
    ]


# What is seen


def _seen(takes: Sequence[Take], speaking: Sequence[Take]) -> Figures:
    areas: list[float] = []
    hits: list[float] = []
    in_time: list[float] = []
    for take in takes:
        due = sorted(_due(take.episode))
        ends = [*(t for t, _ in due[1:]), take.duration_s]
        for (t, text), end in zip(due, ends, strict=True):
            replies = [(w.start, 2.0 * (w.text == text)) for w in _between(take.words, t, end)]
            areas.append(pauc((t, min(end, t + ANSWER_S)), replies))
        alerts = [(word.start, word.end) for word in take.words]
        truth = [(t - EARLY_S, t + LATE_S) for t, _ in due]
        hit, precision, _ = alert_scores(alerts, truth)
        hits += [] if hit is None else [hit] * len(truth)
        in_time += [] if precision is None else [precision] * len(alerts)
    ious = [
        alert_scores(merge(take.segments(), MODEL_GAP_S), truth).iou
        for take in speaking
        if (truth := _to_speak(take.episode))
    ]
    return {
        "pauc": mean(areas),
        "alert_hit": mean(hits),
        "alert_precision": mean(in_time),
        "speech_iou": mean(iou for iou in ious if iou is not None),
        "of": {"seen": len(areas), "alerts": len(in_time)},
    }


def _to_speak(episode: Episode) -> list[Span]:
    ticks = [event.tick for event in episode.events if event.kind == "scale"]
    return merge((((tick + 1) * PERIOD_S, (tick + 2) * PERIOD_S) for tick in ticks), 0.0)


# Reaction


def _reaction(heard: Sequence[Take], seen: Sequence[Take]) -> Figures:
    """From a cue's first sound or white frame to the first sample that answers it."""
    latencies: list[float] = []
    floors: list[float] = []
    for take in [*heard, *seen]:
        due = _due(take.episode)
        matched = match_due(due, take.words, early_s=EARLY_S, late_s=LATE_S)
        for (t, _), word in zip(due, matched, strict=True):
            tick = round(t / PERIOD_S) - 1
            begin = tick * PERIOD_S + _cue_begin(take.episode, tick, take in seen)
            sound = None if word is None else first_sound(take.pcm_N, RATE, *word[:2])
            if sound is not None:
                latencies.append(sound - begin)
                floors.append(floor_s(begin, PERIOD_S))
    named = {"reaction": quantiles(latencies), "floor": quantiles(floors)}
    return {
        **{f"{name}_{q}_s": value for name, all_ in named.items() for q, value in all_.items()},
        "of": {"reactions": len(latencies)},
    }


def _cue_begin(episode: Episode, tick: int, is_seen: bool) -> float:
    """Seconds into the tick in which the cue is."""
    if is_seen:
        return (flash_frame(episode.frames_T_2_Y_Y_3[tick]) + 0.5) * PERIOD_S / 2
    return tone_begin(episode.pcm_T_W[tick], RATE, CUE_HZ)


def _between(words: Sequence[Word], begin: float, end: float) -> list[Word]:
    """Those that begin in begin..end, without the end, in order."""
    return sorted(word for word in words if begin - 1e-9 <= word.start < end - 1e-9)
