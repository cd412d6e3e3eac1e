"""Chromium without a screen, with a camera and a microphone that are made up, driven over its
DevTools protocol."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--mute-audio", "--remote-debugging-port=0",
)  # fmt: skip
_DEVICES = ("--use-fake-device-for-media-stream=fps=10", "--use-fake-ui-for-media-stream")


class Page:
    """One tab. Everything raises AssertionError with what the browser said."""

    def __init__(self, ws: aiohttp.ClientWebSocketResponse[Any]) -> None:
        self._ws = ws
        self._ids = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict]] = {}
        self.requests: list[str] = []  # URLs that were asked for
        self.problems: list[str] = []  # exceptions, errors of the console, what the policy blocked
        self._reader = asyncio.create_task(self._read())

    async def call(self, method: str, **params: Any) -> dict:
        number = next(self._ids)
        self._answers[number] = asyncio.get_running_loop().create_future()
        await self._ws.send_json({"id": number, "method": method, "params": params})
        answer = await asyncio.wait_for(self._answers[number], 60)
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    async def evaluate(self, expression: str) -> Any:
        result = await self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    async def until(self, expression: str, seconds: float = 60.0) -> Any:
        """Its first value that is true."""
        end = asyncio.get_running_loop().time() + seconds
        while not (value := await self.evaluate(expression)):
            if asyncio.get_running_loop().time() > end:
                shown = await self.evaluate("document.body.innerText")
                raise AssertionError(f"never true: {expression}; {self.problems}; {shown}")
            await asyncio.sleep(0.05)
        return value

    async def text(self, selector: str) -> str:
        return await self.evaluate(f"document.querySelector({selector!r}).textContent")

    async def press(self, key: str) -> None:
        """A key, as a user does it: the browser takes it for a gesture."""
        text = {"Space": " ", "Enter": "\r"}.get(key, "")
        key = {"Space": " "}.get(key, key)
        codes = {" ": 32, "Enter": 13, "Tab": 9, "Escape": 27}
        values = {
            "key": key,
            "code": "Space" if key == " " else key,
            "text": text,
            "windowsVirtualKeyCode": codes[key],
        }
        await self.call("Input.dispatchKeyEvent", type="keyDown", **values)
        await self.call("Input.dispatchKeyEvent", **{**values, "type": "keyUp", "text": ""})

    async def type(self, text: str) -> None:
        await self.call("Input.insertText", text=text)

    async def screenshot(self, path: Path) -> None:
        shot = await self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(shot["data"]))

    async def open(self, url: str, *, width: int = 1280, height: int = 800) -> None:
        for domain in ("Page", "Runtime", "Network", "Log"):
            await self.call(f"{domain}.enable")
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=False,
        )  # fmt: skip
        await self.call("Page.navigate", url=url)
        await self.until("document.readyState === 'complete'")

    async def _read(self) -> None:
        async for message in self._ws:
            values = json.loads(message.data)
            if "id" in values:
                self._answers.pop(values["id"]).set_result(values)
            elif values["method"] == "Network.requestWillBeSent":
                self.requests.append(values["params"]["request"]["url"])
            elif values["method"] == "Network.webSocketCreated":
                self.requests.append(values["params"]["url"])
            elif values["method"] == "Runtime.exceptionThrown":
                self.problems.append(str(values["params"]["exceptionDetails"]))
            elif values["method"] == "Log.entryAdded":
                entry = values["params"]["entry"]
                if entry["level"] == "error":
                    self.problems.append(f"{entry['text']} {entry.get('url', '')}")


@contextlib.asynccontextmanager
async def chromium(
    profile: Path, *, microphone: Path | None = None, devices: bool = True
) -> AsyncIterator[Page]:
    """profile: an empty folder. microphone: what it plays, a wav, again and again."""
    assert CHROMIUM is not None
    flags = [*_FLAGS, *(_DEVICES if devices else ()), f"--user-data-dir={profile}"]
    if microphone is not None:
        flags.append(f"--use-file-for-fake-audio-capture={microphone}")
    process = subprocess.Popen(
        [CHROMIUM, *flags, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        port = await _port(profile / "DevToolsActivePort", process)
        async with aiohttp.ClientSession() as http:
            async with http.get(f"http://127.0.0.1:{port}/json/list") as response:
                target = next(t for t in await response.json() if t["type"] == "page")
            async with http.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as ws:
                yield Page(ws)
    finally:
        process.terminate()
        try:
            await asyncio.to_thread(process.wait, 10)
        except subprocess.TimeoutExpired:
            process.kill()


async def _port(path: Path, process: subprocess.Popen) -> int:
    for _ in range(600):
        assert process.poll() is None, f"the browser ended with {process.returncode}"
        if path.exists() and path.read_text().strip():
            return int(path.read_text().splitlines()[0])
        await asyncio.sleep(0.05)
    raise AssertionError("the browser did not start in 30 s")
