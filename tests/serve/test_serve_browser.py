"""The demo's page in a browser, a service behind it: what a user does, and what comes of it."""

from __future__ import annotations

import io
import wave
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from devtools import CHROMIUM, Page, chromium
from fake_model import DELEGATE, FakeModel
from local_service import FAST, Served, serve
from local_service import eventually as within
from PIL import Image

from tml_runtime.cli import CUE_HINT
from tml_runtime.demo.cue.words import SCALE
from tml_runtime.demo.decode import load_audio
from tml_runtime.demo.media import MediaError, speech_path
from tml_runtime.serve.child import local_service

TOKEN = "a token of some length"
TONE_HZ = 1000
eventually = partial(within, seconds=60.0)  # a browser beside other tests takes its time

soundfile = pytest.importorskip("soundfile")

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="chromium is not installed: the page is not tested in a browser"
)


def write_tone(path: Path) -> Path:
    """Half a second of a tone and half a second of silence, 48 kHz."""
    t = np.arange(2 * 48_000) / 48_000
    pcm = 0.3 * np.sin(2 * np.pi * TONE_HZ * t) * (t % 1 < 0.5)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(48_000)
        file.writeframes((pcm * 32767).astype("<i2").tobytes())
    return path


async def start(page: Page, served: Served) -> None:
    await page.open(served.http + "/")
    await page.evaluate("document.querySelector('#start').focus()")
    await page.press("Enter")


async def is_live(page: Page) -> None:
    await page.until("document.querySelector('#state').dataset.state === 'open'")


def has_colour(png: bytes, colour: tuple[int, int, int], count: int) -> bool:
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    return int((pixels == colour).all(-1).sum()) >= count


@pytest.mark.slow
def test_a_user_is_heard_seen_answered_and_may_interrupt(run, tmp_path: Path) -> None:
    model = FakeModel(
        FAST, say=lambda tick, slot: [(ord("a") + tick % 26, DELEGATE)[tick % 9 == 0]]
    )

    async def talk() -> None:
        microphone = write_tone(tmp_path / "microphone.wav")
        async with (
            serve(model, page=True) as served,
            chromium(tmp_path / "profile", microphone=microphone) as page,
        ):
            await start(page, served)
            await page.evaluate("document.querySelector('#barge-in').checked = false")
            await is_live(page)
            (session,) = served.service.sessions

            # Heard and seen
            def rows() -> list:
                return [row for tick in model.heard for row in tick]

            await eventually(lambda: sum(np.abs(row.pcm).max() > 0.1 for row in rows()) > 30)
            pcm = np.concatenate([row.pcm for row in rows()])
            spectrum = np.abs(np.fft.rfft(pcm * np.hanning(len(pcm))))
            hz = np.fft.rfftfreq(len(pcm), 1 / 16_000)
            near = np.abs(hz - TONE_HZ) < 20
            assert (spectrum[near] ** 2).sum() > 0.9 * (spectrum**2).sum()
            assert 0.25 < np.abs(pcm).max() < 0.35  # as loud as it was
            await eventually(lambda: sum(row.frames is not None for row in rows()) > 10)
            frame = [row.frames for row in rows() if row.frames is not None][-1]
            assert frame.shape[2:] == (80, 120, 3)
            assert frame[..., 1].mean() > 2 * frame[..., 0].mean()  # the camera's is green

            # Answered
            await eventually(lambda: session.status()["played"] > 1.0)
            await page.until("/[a-z]{3}/.test(document.querySelector('#said').textContent)")
            await page.until("document.querySelector('#median').textContent.endsWith('ms')")
            label = "document.querySelector('#timeline').ariaLabel"
            await page.until(f"/The last \\d+ ticks/.test({label})")
            await page.screenshot(tmp_path / "page.png")
            png = (tmp_path / "page.png").read_bytes()
            for colour in ((108, 178, 255), (255, 163, 92), (126, 200, 169)):
                assert has_colour(png, colour, 100)  # what it hears, says, and its ticks

            # Interrupted: by a key, by the button, by speaking over it
            for epoch, act in enumerate(("Space", "Enter"), 1):
                played = session.status()["played"]
                await page.press(act)
                await page.until(f"document.querySelector('#epoch').textContent === '{epoch}'")
                assert session.session.epoch == epoch
                await eventually(lambda played=played: session.status()["played"] > played + 0.5)
            await page.evaluate("document.querySelector('#barge-in').click()")
            await eventually(lambda: session.session.epoch > 2)

            # Nothing went elsewhere, nothing was blocked, and all of it ends when asked to
            assert page.problems == []
            assert all(url.startswith((served.http, served.url, "data:")) for url in page.requests)
            await page.evaluate("document.querySelector('#start').click()")
            await eventually(lambda: not served.service.sessions)
            assert await page.text("#state") == "stopped"

    run(talk(), 240.0)


def test_without_devices_with_a_token_and_a_bad_line(run, tmp_path: Path) -> None:
    model = FakeModel(FAST)

    async def talk() -> None:
        async with (
            serve(model, page=True, token=TOKEN) as served,
            chromium(tmp_path / "profile", devices=False) as page,
        ):
            await start(page, served)
            for token in ("a token that is wrong", TOKEN):
                await page.until("document.querySelector('#token-dialog').open")
                assert await page.evaluate("document.activeElement.id") == "token"
                await page.type(token)
                await page.press("Enter")
                await page.until("!document.querySelector('#token-dialog').open")
            await is_live(page)
            notices = "document.querySelector('#notices').innerText"
            for name in ("microphone", "camera"):
                await page.until(f"/No {name}: .+/.test({notices})")

            # All of it by keys alone: each in turn, each seen to have the focus, and out again
            assert await page.evaluate("document.activeElement.id") == "interrupt"
            order = []
            for _ in range(6):
                await page.press("Tab")
                outline = "getComputedStyle(document.activeElement).outlineStyle"
                at = await page.evaluate(f"[document.activeElement.id, {outline}]")
                order.append(at[0])
                assert at[1] == "solid" or at[0] == ""
            assert order[:2] == ["barge-in", "text"] and "said" in order
            await page.evaluate("document.querySelector('#text').focus()")
            await page.type("grüße")
            await page.press("Enter")
            await eventually(lambda: "grüße".encode() == read(model))
            await page.press("Space")  # in a text it is a space
            assert await page.evaluate("document.querySelector('#text').value") == " "
            assert served.service.sessions[0].session.epoch == 0

            # The line breaks, and the session is the same
            (session,) = served.service.sessions
            assert session.connection is not None
            session.connection._cut()
            await eventually(lambda: served.service.counts.resumed == 1)
            await is_live(page)
            # It goes dead without breaking, and the page does not wait for it
            assert session.connection is not None
            session.poll = lambda: 0  # type: ignore[method-assign]
            session.connection._next_output = lambda: None  # type: ignore[method-assign]
            await eventually(lambda: served.service.counts.resumed == 2)
            await is_live(page)
            assert served.service.sessions == [session]
            asked = [*page.requests, await page.evaluate("location.href")]
            assert not any(TOKEN.split()[0] in url.partition("?")[2] for url in asked)
            assert not any("token" in url for url in asked)

    run(talk(), 240.0)


@pytest.mark.slow
def test_the_trained_model_speaks_until_somebody_talks(run, tmp_path: Path) -> None:
    """Real speech in the microphone; nothing in the page or the service tells the model of it."""
    try:
        pcm = load_audio(speech_path())
    except MediaError as error:
        pytest.skip(f"the recording is not there: {error}")
    talk = 0.7 * pcm[round(6.6 * 16_000) : round(9.6 * 16_000)]
    microphone = tmp_path / "microphone.wav"
    soundfile.write(microphone, np.concatenate([np.zeros(8 * 16_000), talk]), 16_000)

    async def listen() -> None:
        async with chromium(tmp_path / "profile", microphone=microphone) as page:
            await page.open(url.replace("ws://", "http://").partition("/v1/")[0] + "/")
            await page.evaluate("document.querySelector('#start').focus()")
            await page.press("Enter")
            await is_live(page)
            await page.evaluate("document.querySelector('#barge-in').checked = false")
            assert (await page.evaluate("document.querySelector('#text').placeholder")) == CUE_HINT
            said = "document.querySelector('#said').textContent"
            words = "|".join(SCALE)

            async def speaks() -> bool:
                """Asked to; where somebody talks already it may yield before its third word."""
                before = len(await page.evaluate(said))
                await page.evaluate("document.querySelector('#text').focus()")
                await page.type("speak")
                await page.press("Enter")
                try:
                    await page.until(f"/(({words}) ){{3}}/.test({said}.slice({before}))", 8.0)
                except AssertionError:
                    return False
                return True

            assert any([await speaks() for _ in range(3)])
            # Then it yields: for two seconds there is not one more word
            await page.evaluate(QUIET)
            await page.until(f"quietSince({said}) > 2000")
            assert await page.text("#epoch") == "0"  # nobody interrupted it but by talking
            assert page.problems == []

    with local_service("--demo", "--probe-ticks", "0", "--sessions", "1") as url:
        run(listen(), 240.0)


QUIET = """(() => {
  let last = "", since = performance.now();
  window.quietSince = (text) => {
    if (text !== last) [last, since] = [text, performance.now()];
    return performance.now() - since;
  };
})()"""


def read(model: FakeModel) -> bytes:
    return bytes(token for tick in model.heard for row in tick for token in row.text)


def test_what_is_refused_is_told_in_words(run, tmp_path: Path) -> None:
    async def talk() -> None:
        async with serve(page=True, slots=1) as served, chromium(tmp_path / "profile") as page:
            async with served.raw(hello={}) as raw:
                await raw.until("welcome")
                await start(page, served)
                await page.until("/All 1 sessions are taken/.test(document.body.innerText)")
                await raw.say(type="bye")
                await raw.closed()
            await page.evaluate("document.querySelector('#start').click()")
            await is_live(page)
            served.service.origins = ()
            await page.evaluate("document.querySelector('#start').click()")
            await eventually(lambda: not served.service.sessions)
            await page.evaluate("document.querySelector('#start').click()")
            await page.until("/--allow-origin http:/.test(document.body.innerText)")

    run(talk(), 240.0)
