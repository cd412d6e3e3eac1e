"""A background model behind an HTTP server that speaks OpenAI's chat completions, streamed."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Mapping
from typing import Any

from ..errors import HandoffError, InputTypeError, InputValueError
from .request import DELEGATE, Request

INSTRUCTIONS = (
    "You think in the background for an assistant in a live conversation. The transcript follows: "
    "what the assistant read is the user's, what it said is the assistant's. What it heard and saw "
    "is not in it. Your answer goes to the assistant, who puts it into its own words: give it the "
    "facts, in short, without a greeting."
)
ASK = "Do what the conversation above needs that takes thought."

# Headers that a request has. Of "x-stainless-..." too: which client it is, and its retries.
_SENT = {
    "accept",
    "accept-encoding",
    "authorization",
    "connection",
    "content-length",
    "content-type",
    "host",
    "user-agent",
}


class OpenAIModel:
    """A client of any server with `/chat/completions` (OpenAI, vLLM, SGLang, llama.cpp, ...).

    base_url: such as "http://localhost:8000/v1". api_key: None sends a placeholder; of the
    environment neither a key nor a header is sent. instructions: the system message, with the
    session's prompt after it. ask: the last message when the model itself delegates. max_tokens:
    asked of the server, None to leave that to it. extra: more fields of the request, such as
    temperature. connect_timeout: seconds; idle_timeout: between two pieces, the first too.
    max_retries: of a request that the server has not begun to answer (no connection, 408, 409, 429,
    5xx), with its Retry-After as long as that fits. max_bytes: of a response, whatever is in it.

    Needs the package `openai` (`pip install "tml-kernels[handoff]"`), else ImportError.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: str | None = None,
        instructions: str = INSTRUCTIONS,
        ask: str = ASK,
        max_tokens: int | None = 1024,
        extra: Mapping[str, Any] | None = None,
        connect_timeout: float = 5.0,
        idle_timeout: float = 20.0,
        max_retries: int = 2,
        max_bytes: int = 4 << 20,
    ) -> None:
        if not isinstance(base_url, str) or not base_url.startswith(("http://", "https://")):
            raise InputValueError(f"base_url={base_url!r}: expected http://... or https://...")
        for name, value in (("connect_timeout", connect_timeout), ("idle_timeout", idle_timeout)):
            if type(value) not in (int, float) or not 0.0 < value < math.inf:
                raise InputValueError(f"{name}={value!r} is not a positive number of seconds")
        for name, value, least in (("max_retries", max_retries, 0), ("max_bytes", max_bytes, 1)):
            if type(value) is not int or value < least:
                raise InputValueError(f"{name}={value!r}: expected an int of at least {least}")
        if not isinstance(model, str):
            raise InputTypeError(f"model={model!r}: expected a name")
        self._openai = _import_openai()
        self._base_url, self._api_key = base_url, api_key or "none"
        self._instructions, self._ask = instructions, ask
        self._connect_timeout, self._idle_timeout = connect_timeout, idle_timeout
        self._max_retries, self._max_bytes = max_retries, max_bytes
        self._options: dict[str, Any] = {"model": model, "stream": True}
        if max_tokens is not None:
            self._options["max_tokens"] = max_tokens
        if extra:
            self._options["extra_body"] = dict(extra)
        self._client: Any = None  # belongs to one event loop, so it is made there

    async def stream(self, request: Request) -> AsyncIterator[str]:
        openai = self._openai
        if self._client is None:
            self._client = self._make_client()
        try:
            response = await self._client.chat.completions.create(
                messages=self._messages(request), **self._options
            )
            async with response:
                async for text in self._texts(response):
                    yield text
        except openai.APIStatusError as error:
            raise HandoffError(f"its server said {error.status_code}") from error
        except (openai.APITimeoutError, asyncio.TimeoutError) as error:
            raise HandoffError(f"its server was silent for {self._idle_timeout:g} s") from error
        except openai.APIConnectionError as error:
            raise HandoffError("the connection to its server failed") from error
        except openai.OpenAIError as error:
            raise HandoffError("its server reported an error") from error
        except (ValueError, TypeError, AttributeError) as error:
            raise HandoffError("its server sent what is no chat completion") from error

    async def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.close()

    def _make_client(self) -> Any:
        openai = self._openai
        timeout = openai.Timeout(self._idle_timeout, connect=self._connect_timeout)
        return openai.AsyncOpenAI(
            base_url=self._base_url,
            api_key=self._api_key,
            timeout=timeout,
            max_retries=self._max_retries,
            default_headers={"Accept-Encoding": "identity"},
            http_client=openai.DefaultAsyncHttpxClient(
                timeout=timeout,
                event_hooks={"request": [self._address], "response": [self._guard]},
            ),
        )

    async def _address(self, request: Any) -> None:
        """Leave out what the client adds of the environment, which is for another server: an
        organisation, a project, headers of any name."""
        for name in list(request.headers):
            if name not in _SENT and not name.startswith("x-stainless-"):
                del request.headers[name]
        request.headers["authorization"] = f"Bearer {self._api_key}"

    async def _guard(self, response: Any) -> None:
        """Refuse what is no stream of events, and bound what is read of any response: the client
        reads lines and error bodies of any length."""
        encoding = response.headers.get("content-encoding", "identity")
        if encoding != "identity":
            raise HandoffError(f"its server sent {encoding!r:.40}, which was not asked for")
        media = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        if response.status_code == 200 and media != "text/event-stream":
            raise HandoffError(f"its server sent {media!r:.40}, not a stream of events")
        read, limit = response.aiter_raw, self._max_bytes

        async def read_bounded(chunk_size: int | None = None) -> AsyncIterator[bytes]:
            left = limit
            async for chunk in read(chunk_size):
                left -= len(chunk)
                if left < 0:
                    raise HandoffError(f"its server sent more than {limit} bytes")
                yield chunk

        response.aiter_raw = read_bounded

    async def _texts(self, response: Any) -> AsyncIterator[str]:
        """Text up to the chunk that says why the answer ends: what comes then is not waited for."""
        chunks = response.__aiter__()
        while True:
            try:
                chunk = await asyncio.wait_for(chunks.__anext__(), self._idle_timeout)
            except StopAsyncIteration:
                raise HandoffError("its answer broke off") from None
            for choice in chunk.choices[:1]:  # none in a chunk that reports usage
                text = choice.delta.content
                if isinstance(text, str) and text:
                    yield text
                elif text:
                    raise TypeError(f"content is {text!r:.80}")
                if choice.finish_reason is not None:
                    return

    def _messages(self, request: Request) -> list[dict[str, str]]:
        """Of alternating roles after the system's, which is what the strictest servers take."""
        ask = self._ask if request.trigger == DELEGATE else request.trigger
        turns = [("system", self._instructions), *((t.role, t.text) for t in request.turns)]
        messages: list[dict[str, str]] = []
        for role, text in [*turns, ("user", ask)]:
            if messages and messages[-1]["role"] == role:
                messages[-1]["content"] += f"\n{text}"
            elif text:
                messages.append({"role": role, "content": text})
        return messages


def _import_openai() -> Any:
    try:
        import openai
    except ImportError as error:
        raise ImportError(
            f"OpenAIModel needs the package openai, which cannot be imported ({error}): "
            'pip install "tml-kernels[handoff]"'
        ) from error
    return openai
