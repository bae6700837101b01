"""Serve the page: on this machine unless told otherwise, with bounds on what is sent, and with no file but its own."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NoReturn

from wadi.errors import WadiError
from wadi.io.installation import require
from wadi.parallel.signals import stop_on_signals

if TYPE_CHECKING:
    from wadi.app.studio import Studio

LOCAL = ("127.0.0.1", "localhost", "::1")
BODY = 4 * 2**20  # bytes of a request that is not an upload
FORM = 2**16  # bytes that a form adds to the file in it
# Nothing is loaded from other servers, and no other site may show the page in a frame.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' blob: data:; worker-src 'self' blob:; "
    "frame-ancestors 'none'; form-action 'self'; base-uri 'self'"
)


@dataclass(frozen=True)
class Address:
    """Where to serve. ``port`` None = the first free one from 7860."""

    host: str = "127.0.0.1"
    port: int | None = None


class Guarded:
    """ASGI middleware: refuse bodies that are too large, before they are read, and send `POLICY` with each answer."""

    def __init__(self, app: Any, upload: int) -> None:
        self.app, self.upload = app, upload

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer 413 for a body above the limit; else pass the request on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit = self.upload + FORM if scope["path"].rstrip("/").endswith("/upload") else BODY
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > limit:
            await _refuse(send, limit)
            return
        received = 0

        async def counted() -> Any:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            return {"type": "http.disconnect"} if received > limit else message  # a chunked body without a length

        async def with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                own = [(b"content-security-policy", POLICY.encode()), (b"x-content-type-options", b"nosniff")]
                message = {**message, "headers": [*message.get("headers", []), *own]}
            await send(message)

        await self.app(scope, counted, with_policy)


async def _refuse(send: Any, limit: int) -> None:
    text = f"The request is too large. The limit is {limit:,} bytes.".encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": 413, "headers": headers})
    await send({"type": "http.response.body", "body": text})


def check_gradio() -> None:
    """Raise `WadiError` if Gradio is not installed."""
    require("app", "The page", "gradio")


def serve(studio: Studio, address: Address, ready: Callable[[str], Any] = print) -> NoReturn:
    """Serve the page until a signal arrives. Uploads and images lie in a temporary folder, removed at the end.

    Args:
        ready: called with the page's address once it answers.
    Raises:
        WadiError: if Gradio is missing, or host and port cannot be used.
        Interrupted: always at the end, with the signal that ended it.
    """
    check_gradio()
    check_free(address)
    with TemporaryDirectory(prefix="wadi-app-") as folder:
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
        page, url = launch(studio, address)
        try:
            with stop_on_signals() as stop:
                ready(url)
                while stop.signal is None:
                    time.sleep(0.2)
        finally:
            page.close(verbose=False)
    raise stop.interrupted("The page is closed.")


def launch(studio: Studio, address: Address) -> tuple[Any, str]:
    """Start the server in a thread. Return Gradio's page and its address. `serve` is this with a folder of its own."""
    import gradio as gr
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from wadi.app.page import CSS, build

    limits = studio.limits
    middleware = [Middleware(Guarded, upload=limits.upload)]
    if address.host in LOCAL:  # another site's name that resolves to this machine is no way in
        middleware.append(Middleware(TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1", "[::1]", "[", "::1"]))
    page = build(studio).queue(max_size=limits.queue, default_concurrency_limit=4)
    font = ["system-ui", "sans-serif"]
    _, url, _ = page.launch(
        server_name=address.host, server_port=address.port, share=False, prevent_thread_lock=True, quiet=True, show_error=True,
        max_file_size=limits.upload, allowed_paths=[], footer_links=[], css=CSS, ssr_mode=False, pwa=False, mcp_server=False,
        theme=gr.themes.Default(primary_hue="blue", font=font, font_mono=["ui-monospace", "monospace"]), run_history=False,
        app_kwargs={"middleware": middleware}, state_session_capacity=1000,
    )  # fmt: skip
    return page, url


def check_free(address: Address) -> None:
    """Raise `WadiError` if ``address`` cannot be listened at."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        with socket.socket(family) as listening:
            if sys.platform != "win32":
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind((address.host, address.port or 0))
    except OSError as error:
        where = f"host {address.host!r}" + (f", port {address.port}" if address.port else "")
        raise WadiError(f"The page cannot be served at {where}: {error.strerror or error}. Choose others.") from error
