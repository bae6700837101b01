"""``wadi app``: a web page to generate with students and to look at runs."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from wadi.cli.family import add_family
from wadi.errors import WadiError
from wadi.io.bounds import SIDE, Whole

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from wadi.cli.parser import Arguments

PORT = Whole(1, 65_535)
IMAGES = Whole(1, 64)
QUEUE = Whole(1, 10_000)
MEBIBYTES = Whole(1, 1024)


def add_options(parser: ArgumentParser) -> None:
    """Add the options of ``wadi app``."""
    add = parser.add_argument
    runs = "folders of runs, also of those that still train, and of exported pipelines; zoo = the embedded student, the default"
    add("runs", nargs="*", help=runs)
    add("--control", type=str, action="append", default=None, help="ControlNet or T2I-Adapter to offer; repeat for several")
    add("--dtype", type=str, default="float32", help="type of the weights: float32, bfloat16 or float16")
    add("--device", type=str, default=None, help="cpu, cuda, cuda:1, ...; default: a GPU if there is one")
    add = parser.add_argument_group("address").add_argument
    host = "address to serve at; 0.0.0.0 lets other machines in, without a password"
    add("--host", type=str, default="127.0.0.1", help=host)
    add("--port", type=PORT, default=None, help="port; default: the first free one from 7860")
    add("--open", action="store_true", help="open the page in the browser")
    add = parser.add_argument_group("bounds for visitors").add_argument
    add("--most-images", type=IMAGES, default=8, help="images per request")
    side = "longest side in pixels; default: twice the size that the student was trained for"
    add("--largest-side", type=SIDE, default=None, help=side)
    add("--queue", type=QUEUE, default=100, help="requests that may wait")
    add("--upload", type=MEBIBYTES, default=20, help="MiB of an uploaded image")
    add_family(parser)


def run(arguments: Arguments) -> int:
    """Serve the page until Ctrl-C."""
    from wadi.app.models import Models, sources
    from wadi.app.server import LOCAL, Address, check_free, check_gradio, serve

    options = arguments.options
    found = sources(options.runs)
    check_gradio()
    address = Address(options.host, options.port)
    check_free(address)
    from wadi.app.request import Limits
    from wadi.app.studio import Studio
    from wadi.parallel.device import dtype_of, find_device

    limits = Limits(count=options.most_images, side=options.largest_side, upload=options.upload * 2**20, queue=options.queue)
    models = Models(found, dtype_of(options.dtype), find_device(options.device))
    studio = Studio(models, limits, controls_from(options.control))
    if options.host not in LOCAL:
        print(f"wadi: the page is open to every machine that reaches {options.host}: it has no password.", file=sys.stderr)

    def ready(url: str) -> None:
        print(f"{', '.join(models.sources)}: {url}   (Ctrl-C ends)", flush=True)
        if options.open:
            import webbrowser

            webbrowser.open(url)

    serve(studio, address, ready)


def controls_from(given: list[str] | None) -> dict[str, str]:
    """Return the controls to offer by their names; the embedded one is always among them.

    Raises:
        WadiError: if one is an IP-Adapter, which changes the network of every other request.
    """
    from pathlib import Path

    from wadi.extras.control.load import is_image_prompt
    from wadi.zoo.paths import NAME

    controls = {NAME: NAME}
    for source in given or []:
        if is_image_prompt(source):
            raise WadiError(f"--control {source!r} is an IP-Adapter. The page takes ControlNets and T2I-Adapters only.")
        name = source if source == NAME else Path(source).name or source
        controls[name if name not in controls else source] = source
    return controls
