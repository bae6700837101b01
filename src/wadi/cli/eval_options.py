"""The options of ``wadi eval``: their help, and the protocol, metrics and weights that they name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from wadi.cli.family import add_family
from wadi.errors import WadiError
from wadi.io.bounds import BATCH, COUNT, GUIDANCE, SEED, STEPS, THREADS, Whole

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from wadi.evaluate.protocols import Protocol


def add_options(parser: ArgumentParser) -> None:
    """Add the options of ``wadi eval``."""
    add = parser.add_argument
    add("what", nargs="*", default=[], help="folders of images; or runs, adapters, pipelines (folder or Hub id), zoo")
    add("--compare", nargs=2, default=None, help="two result files: print both if the same protocol made them")
    _add_protocol(parser)
    _add_generators(parser)
    _add_metrics(parser)
    add = parser.add_argument_group("output").add_argument
    add("--out", type=str, default=None, help="JSON file to write the result to")
    add("--table", type=str, default=None, help="Markdown file: the table goes between its markers, or into a new file")
    pictures = "folder in which generated images are kept; an interrupted command continues from it"
    add("--pictures", type=str, default="runs/eval", help=pictures)
    add_family(parser)


def _add_protocol(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("prompts and reference").add_argument
    add("--protocol", type=str, default=None, help="zoo, coco2014-30k, coco2017-5k, or a file of prompts")
    add("--reference", type=str, default=None, help="folder of images; a COCO folder for coco*; teacher = it generates them")
    prompts = "file with the prompt of each image of a folder, in the natural order of the names (2 before 10)"
    add("--prompts", type=str, default=None, help=prompts)
    add("--pairs", type=str, default=None, help='JSON lines {"file": "0.png", "prompt": "..."} for the images of a folder')
    add("--count", type=COUNT, default=None, help="use only this many prompts of the protocol; default: all")
    add("--set", type=Whole(0, 10**12), default=1, help="set s has the seeds s * 1000000 + index; 0 is that of the reference")
    add("--ids", type=str, default=None, help="file of COCO annotation ids, in place of the documented choice of captions")
    add("--coco-seed", type=SEED, default=0, help="seed of the documented choice of captions")
    size = "crop images to the central square and resize them to this many pixels; default: as the protocol says"
    add("--size", type=Whole(1, 8192), default=None, help=size)


def _add_generators(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("generating").add_argument
    add("--teacher", type=str, default=None, help="pipeline to use in place of the one that an adapter names")
    steps = "steps of a pipeline, with its own scheduler; default: those that a student was trained for, else 1"
    add("--steps", type=STEPS, default=None, help=steps)
    guidance = "guidance of a pipeline's steps; default: none for a student and in one step, else 3, for FLUX 1 (none)"
    add("--guidance-scale", type=GUIDANCE, default=None, help=guidance)
    add("--beside-teacher", action="store_true", help="evaluate the teacher too: in many steps, and undistilled in one")
    add("--teacher-steps", type=STEPS, default=25, help="steps of the teacher")
    guidance = "guidance of the teacher; default: 3, for zoo 2.5, for FLUX 1 (none)"
    add("--teacher-guidance-scale", type=GUIDANCE, default=None, help=guidance)
    add("--draw-batch", type=BATCH, default=8, help="images generated at once")
    add("--speed", type=Whole(0, 10_000), default=0, help="time this many calls of each generator, in turns; 0 = none")
    add("--dtype", type=str, default="float32", help="type of the generators' weights: float32, bfloat16 or float16")
    add("--device", type=str, default=None, help="cpu, cuda, cuda:1, ...; default: a GPU if there is one")
    add("--threads", type=THREADS, default=None, help="number of CPU threads; default: torch's choice")


def _add_metrics(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("metrics").add_argument
    metrics = "comma-separated: fid kid fd kd pr clip diversity ...; default: those of the protocol"
    add("--metrics", type=str, default=None, help=metrics)
    features = "network of fd, kd, pr, diversity: embedded, inception, dinov2[:NAME], zoo; default: that of the protocol"
    add("--features", type=str, default=None, help=features)
    add("--k", type=Whole(1, 10_000), default=3, help="number of nearest neighbours of the metric pr")
    add("--resize", type=str, default="clean", help="filter before a feature network: clean, legacy-tf, legacy-torch, ...")
    add("--no-spread", action="store_true", help="leave out the standard deviations")
    rounds = "option of older versions: 0 means --no-spread, other values have no effect"
    add("--rounds", type=Whole(0, 1_000_000), default=None, help=rounds)
    add("--inception", type=str, default=None, help="file inception-2015-12-05.pt; default: in the cache folder")
    add("--download", action="store_true", help="download that file if it is missing (96 MB)")
    weights = "NAME=PLACE of a scorer's weights, such as clip=openai/clip-vit-large-patch14"
    add("--weights", type=str, nargs="*", default=[], help=weights)
    add("--batch", type=BATCH, default=32, help="images per call of the feature network")


def protocol_from(options: Any) -> Protocol | None:
    """Return the protocol of ``--protocol``; None without one.

    Raises:
        WadiError: if it is neither a known name nor a file, or a COCO protocol has no folder.
    """
    from wadi.evaluate import protocols

    if options.protocol is None:
        return None
    if options.protocol == "zoo":
        return protocols.zoo(options.count)
    if options.protocol in protocols.COCO:
        if options.reference is None:
            raise WadiError(f"Protocol {options.protocol} needs --reference FOLDER: a COCO folder with annotations/ in it.")
        return protocols.coco(options.protocol, options.reference, options.coco_seed, options.ids, options.count)
    if not Path(options.protocol).exists():
        raise WadiError(f"--protocol is {options.protocol!r}. Use {', '.join(protocols.NAMES)}, or a file of prompts.")
    return protocols.prompt_file(options.protocol, options.size, options.count)


def metrics_from(options: Any, protocol: Protocol | None) -> tuple[str, ...]:
    """Return the metrics of ``--metrics``, or those of the protocol."""
    metrics = tuple(filter(None, (options.metrics or "").replace(" ", ",").split(",")))
    return protocol.metrics if protocol is not None and not metrics else metrics


def weights_from(options: Any) -> dict[str, str]:
    """Return the places of ``--weights`` by name.

    Raises:
        WadiError: if an entry is not ``NAME=PLACE``, or a name comes twice.
    """
    places: dict[str, str] = {}
    for entry in options.weights:
        name, equals, place = entry.partition("=")
        if not (name and equals and place):
            raise WadiError(f"--weights contains {entry!r}. Expected NAME=PLACE, such as clip=openai/clip-vit-large-patch14.")
        if name in places:
            raise WadiError(f"--weights names {name!r} twice. Give one place.")
        places[name] = place
    return places
