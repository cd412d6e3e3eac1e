"""The demo's page: a few static files, shipped with the package, and what a browser may do there.

The page asks nothing of any other host, and nothing but its own files runs in it.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable
from importlib import resources

from aiohttp import web

_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "mjs": "text/javascript; charset=utf-8",
}
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": _POLICY,
    "Permissions-Policy": "microphone=(self), camera=(self)",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


def add_page(app: web.Application) -> None:
    """Its files, each at its own path; nothing else of the folder can be asked for."""
    for file in resources.files("tml_runtime.serve").joinpath("web").iterdir():
        content_type = _TYPES.get(file.name.rpartition(".")[2])
        if content_type is not None:
            path = "/" if file.name == "index.html" else f"/{file.name}"
            app.router.add_get(path, _answer(file.read_bytes(), content_type))


def page_origins(host: str, port: int) -> tuple[str, ...]:
    """Origins of the page as a browser may name an address that is listened on.

    They come from the address and never from a request, whose Host anybody can have made up.

    >>> page_origins("127.0.0.1", 8760)
    ('http://127.0.0.1:8760', 'http://localhost:8760')
    """
    address = ipaddress.ip_address(host)
    if address.is_unspecified:
        return ()
    names = [f"[{host}]" if address.version == 6 else host]
    if address.is_loopback:
        names.append("localhost")
    return tuple(f"http://{name}" + (f":{port}" if port != 80 else "") for name in names)


def _answer(
    body: bytes, content_type: str
) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(body=body, headers={"Content-Type": content_type, **HEADERS})

    return answer
