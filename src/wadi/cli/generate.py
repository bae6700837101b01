"""``wadi generate``: pictures of a one-step student, with what goes with them: size, steps, a start, LoRA, token, control.

The order is fixed: token and LoRA go into the weights, then the size, then the control, then the schedule. What remains is an
ordinary diffusers pipeline and the arguments of its call.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wadi.errors import WadiError
from wadi.io.bounds import BATCH, COUNT, GUIDANCE, SCALE, SEED, SIDE, STEPS, Number, Whole
from wadi.io.files import sha256
from wadi.io.outputs import check_writable

if TYPE_CHECKING:
    from wadi.extras.high_resolution.redilation import Factor

NUMBER = r"\d{1,6}(?:\.\d{1,6})?"
STRENGTH = Number(0, 1, above=True)
MODE = Whole(0, 1000)
IMAGE_SIDE = Whole(8, SIDE.high)  # the autoencoder of every family has at least 8 pixels a latent


def add_options(parser: Any) -> None:
    """The options of ``wadi generate``."""
    add = parser.add_argument
    add("prompt", nargs="?", default=None, help="what to draw")
    add("--prompts", default=None, help="text file with one prompt a line; --out is then a folder")
    add("--out", type=str, default="wadi.png", help="PNG image, which is replaced; or folder for a prompts file")
    add("--overwrite", action="store_true", help="with --prompts: replace images in --out that were made otherwise")
    add("--run", type=str, default=None, help="folder of a run or of an exported pipeline")
    add("--adapter", type=str, default=None, help="folder of a student's adapter")
    add("--teacher", type=str, default=None, help="pipeline folder or Hub id that the rotation is applied to")
    add("--seed", type=SEED, default=0, help="of the first picture; later ones count up")
    add("--count", type=COUNT, default=1, help="pictures per prompt")
    add("--batch", type=BATCH, default=8, help="pictures drawn at once; does not change them")
    add("--dtype", type=str, default="float32", help="float32, bfloat16 or float16")
    add("--device", type=str, default=None, help="cpu, cuda, cuda:1, ...; default: the best there is")
    add("--steps", type=STEPS, default=1, help="of the student: noise again and predict again (docs/steps.md)")
    add("--init", type=str, default=None, help="picture to start from")
    add("--strength", type=STRENGTH, default=None, help="how far to leave --init: above 0 (not at all) to 1; default 0.8")
    add("--size", type=str, default=None, help="WIDTHxHEIGHT in pixels, also beyond the training size (docs/highres.md)")
    add("--redilate", type=str, default=None, help="with --size: factor of what convolutions see, D or DOWNxACROSS; 1 = plain")
    add("--redilate_blocks", nargs="+", default=None, help="with --size: blocks to re-dilate, or all; default: the deepest")
    add("--disperse", action="store_true", help="with --size: dispersed kernels make for a factor of two")
    add("--tiled_vae", action="store_true", help="decode in tiles; above a megapixel that is done anyway")
    many: dict[str, Any] = {"action": "append", "default": None}
    add("--lora", type=str, **many, help="LoRA or LoRaD customisation for the weights; repeat it for several")
    add("--lora_scale", "--lora-scale", type=str, **many, help="scale of --lora, once for each; default 1")
    add("--token", type=str, **many, help="file of a learned token (textual inversion) for the prompts; repeat it for several")
    add("--token_name", type=str, **many, help="name of --token in prompts, such as '<R>', once for each; default: the file's")
    add("--control", type=str, **many, help="ControlNet, T2I-Adapter or IP-Adapter: zoo, folder, Hub id or file; may repeat")
    add("--condition", type=str, **many, help="condition image of --control, once for each")
    add("--condition_from", type=str, **many, help="make --condition first: canny, scribble, depth, pose, none; once for each")
    add("--control_scale", "--control-scale", type=str, **many, help="strength of --control, once for each; default 1")
    add("--control_mode", type=str, **many, help="number of the condition's kind for a union ControlNet of FLUX, once for each")
    add("--image_encoder", type=str, default=None, help="CLIP vision model of an IP-Adapter, a folder; default: near its file")
    add("--compare", action="store_true", help="put the teacher's many-step pictures beside, with both times")
    add("--teacher_steps", type=STEPS, default=None, help="steps of the teacher with --compare; default: 25")
    add("--guidance_scale", type=GUIDANCE, default=None, help="of the teacher with --compare; default: 2, for FLUX 1 (none)")


def run(argv: Sequence[str], parse: Callable[..., Any], make_parser: Callable[[str], Any]) -> int:
    """Run the command; ``parse`` and ``make_parser`` are the command line's own."""
    parser = make_parser("generate")
    add_options(parser)
    args = parse(parser, argv)
    refuse_conflicts(args)
    prompts, size, factor = prompts_of(args), size_of(args.size), factor_of(args.redilate)
    in_folder, out = args.prompts is not None and not args.compare, target_of(args)
    from wadi.pipelines.generate import generate, planned

    wanted = planned(prompts, args.seed, args.count)
    refuse_output(args, out, in_folder)
    settings: dict[str, Any] = {}
    if in_folder:
        from wadi.io import image_folder

        settings = settings_of(args)
        if not image_folder.missing_images(out, wanted, settings, args.overwrite):
            print(f"All {len(wanted)} images are there already: {out}")
            return 0
    if size is not None:
        refuse_too_large(size, min(args.batch, len(wanted)), place(args)["device"])
    drawing = prepare(student(args), args, size)
    with drawing.sized(factor, args):
        if args.compare:
            return _compare(drawing, prompts, out, args)
        made = generate(
            drawing.pipeline, prompts, out, args.seed, args.count, args.batch, in_folder, drawing.call, drawing.start,
            settings, args.overwrite,
        )  # fmt: skip
    kept = f", {made.kept} of them there already" if made.kept else ""
    print(f"{len(made.paths)} image(s){kept}, {made.ms_per_image:.0f} ms each: {out}")
    return 0


def _compare(drawing: Drawing, prompts: list[str], out: Path, args: Any) -> int:
    from wadi.backbones import from_pipeline
    from wadi.extras.high_resolution.resize import tiled_decoding
    from wadi.io.grids import save_png
    from wadi.pipelines.generate import compare, teacher_of
    from wadi.sampling import check_steps

    teacher = customised(teacher_of(args.run, adapter=args.adapter, teacher=args.teacher, **place(args)), args)
    columns = [prompt for prompt in prompts for _ in range(args.count)]
    seeds = [args.seed + i for i in range(len(columns))]
    steps = 25 if args.teacher_steps is None else args.teacher_steps
    backbone = from_pipeline(teacher)
    check_steps(backbone, steps, "--teacher_steps")
    guidance = backbone.teacher_guidance(args.guidance_scale, 2.0)
    with tiled_decoding(teacher.vae, args.tiled_vae):
        picture, slow, fast = compare(drawing.pipeline, teacher, columns, seeds, steps, guidance, drawing.call, args.batch)
    save_png(picture, out)
    print(f"teacher {slow:.0f} ms, student {fast:.0f} ms per image, {slow / fast:.1f} times as fast: {out}")
    return 0


# --- what is asked for ------------------------------------------------------------------------------------------------------


def refuse_conflicts(args: Any) -> None:
    """Raise `WadiError` for options that do not go together, before anything is loaded."""
    needs = (
        ("strength", "init"), ("redilate", "size"), ("redilate_blocks", "size"), ("disperse", "size"),
        ("lora_scale", "lora"), ("condition", "control"), ("condition_from", "control"), ("control_scale", "control"),
        ("control", "condition"), ("control_mode", "control"), ("image_encoder", "control"), ("token_name", "token"),
        ("teacher_steps", "compare"), ("guidance_scale", "compare"), ("overwrite", "prompts"),
    )  # fmt: skip
    for option, other in needs:
        if getattr(args, option) not in (None, False) and getattr(args, other) in (None, False):
            raise WadiError(f"--{option} was given without --{other}. Expected both, or neither.")
    for option, other in (
        ("lora_scale", "lora"), ("token_name", "token"), ("condition", "control"), ("condition_from", "control"),
        ("control_scale", "control"), ("control_mode", "control"),
    ):  # fmt: skip
        given, wanted = getattr(args, option), getattr(args, other)
        if given is not None and len(given) != len(wanted):
            raise WadiError(
                f"--{option} was given {len(given)} times and --{other} {len(wanted)} times. Give --{option} once for each "
                f"--{other}, in the same order."
            )
    for option in ("lora_scale", "control_scale", "control_mode"):
        numbers(args, option, None, None)
    if args.run is not None and args.adapter is not None:
        raise WadiError(f"--run {args.run!r} and --adapter {args.adapter!r} were given. Give one of them.")
    if is_export(args.run):
        for option in ("teacher", "compare"):
            if getattr(args, option) not in (None, False):
                raise WadiError(
                    f"--{option} was given, and --run {args.run!r} is an exported pipeline, whose weights are complete: it has "
                    f"no teacher. Leave out --{option}, or give --run with a run's folder, or --adapter."
                )
    if args.compare:
        if args.overwrite:
            raise WadiError("--compare and --overwrite were given. Give one of them: --compare replaces its image anyway.")
        for option in ("init", "size", "control"):
            if getattr(args, option) is not None:
                raise WadiError(
                    f"--compare and --{option} were given. Expected one of them: the teacher has no such option here."
                )
    from wadi.extras.steps import check

    check(args.steps, strength_of(args))


def is_export(run: str | None) -> bool:
    """Whether ``--run`` names a diffusers pipeline: the weights of a student, without its teacher."""
    return run is not None and (Path(run) / "model_index.json").is_file()


def target_of(args: Any) -> Path:
    """The image, or the folder for a prompts file; its comparison is an image in there."""
    return Path(args.out) / "compare.png" if args.compare and args.prompts is not None else Path(args.out)


def refuse_output(args: Any, out: Path, folder: bool) -> None:
    """Raise `WadiError` if ``out`` cannot be written, or is the image that another option reads."""
    check_writable(out, () if folder else (".png",), folder)
    for option in ("init", "condition"):
        given = getattr(args, option) or []
        for source in [given] if isinstance(given, str) else given:
            if not folder and out.exists() and Path(source).exists() and out.samefile(source):
                raise WadiError(
                    f"--out {str(out)!r} is the image that --{option} reads, which would be lost. Choose another name."
                )


def refuse_too_large(size: tuple[int, int], batch: int, device: Any) -> None:
    """Raise `WadiError` if the images of one batch, decoded, do not fit in memory by themselves.

    A decoded image takes 24 bytes a pixel (float32, twice) and 3 as pixels; the network needs more.
    """
    from wadi.parallel.device import free_memory

    each, free = size[0] * size[1] * 27, free_memory(device)
    if batch * each > free:
        hint = f"--batch {max(1, free // each)}" if each <= free else "a smaller --size"
        raise WadiError(
            f"{batch} image(s) of {size[1]}x{size[0]} take at least {batch * each:,} bytes, and {free:,} are free. Use {hint}."
        )


def settings_of(args: Any) -> dict[str, Any]:
    """Everything that decides about the images besides prompt and seed: options, and digests of the files they name."""
    not_of_images = {
        "prompt", "prompts", "out", "seed", "count", "batch", "device", "compare", "overwrite", "teacher_steps",
        "guidance_scale", "run", "adapter", "teacher",
    }  # fmt: skip
    options = {name: value for name, value in vars(args).items() if name not in not_of_images and value not in (None, False)}
    if args.init is not None:
        options["strength"] = strength_of(args)
    return {"student": weights_of(args), **{name: content_of(value) for name, value in options.items()}}


def weights_of(args: Any) -> dict[str, Any]:
    """Digests of the student's weights."""
    from wadi.backbones.digest import teacher_digest
    from wadi.pipelines.generate import about_of, locate

    if is_export(args.run):
        return {"pipeline": teacher_digest(args.run)}
    folder, base = locate(args.run, args.adapter, args.teacher)
    about = about_of(folder)
    return {
        "adapter": sha256(folder / "adapter_model.safetensors"), "adapter_config": sha256(folder / "adapter_config.json"),
        "teacher": teacher_digest(base), "timestep": about.timestep, "resolution": about.resolution,
    }  # fmt: skip


def content_of(value: Any) -> Any:
    """``value``, or the digest of what it names if it is a path, or a list of them."""
    if isinstance(value, (list, tuple)):
        return [content_of(one) for one in value]
    if not isinstance(value, str) or not os.path.exists(value):
        return value
    path = Path(value)
    if path.is_file():
        return sha256(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return hashlib.sha256("".join(f"{file.relative_to(path)} {sha256(file)}\n" for file in files).encode()).hexdigest()


def strength_of(args: Any) -> float:
    """``--strength``, or what it is unless given; 1 without ``--init``."""
    if args.init is None:
        return 1.0
    return 0.8 if args.strength is None else float(args.strength)


def size_of(text: str | None) -> tuple[int, int] | None:
    """``(height, width)`` of ``WIDTHxHEIGHT``."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,18})x(\d{1,18})", text.lower())
    if not found:
        raise WadiError(f"--size is {text[:80]!r}. Expected WIDTHxHEIGHT in pixels, as 1792x1024.")
    width, height = int(found[1]), int(found[2])
    if not all(IMAGE_SIDE.low <= side <= IMAGE_SIDE.high for side in (width, height)):
        raise WadiError(f"--size is {text!r}. Each side must be from {IMAGE_SIDE.low} to {IMAGE_SIDE.high:,} pixels.")
    return height, width


def factor_of(text: str | None) -> Factor | None:
    """``--redilate`` as one factor or ``(down, across)``."""
    if text is None:
        return None
    from wadi.extras.high_resolution.redilation import pair

    if re.fullmatch(NUMBER, text):
        pair(float(text))
        return float(text)
    if found := re.fullmatch(f"({NUMBER})x({NUMBER})", text.lower()):
        return pair((float(found[1]), float(found[2])))
    raise WadiError(f"--redilate is {text!r}. Expected a factor of at least 1, as 2 or 1.5, or one for each axis, as 2x3.5.")


def prompts_of(args: Any) -> list[str]:
    """The prompt, or those of the file."""
    from wadi.prompts.reading import read_prompts

    if (args.prompt is None) == (args.prompts is None):
        raise WadiError(
            "Expected either a prompt or --prompts FILE, and received " + ("neither." if args.prompt is None else "both.")
        )
    return [args.prompt] if args.prompt is not None else read_prompts(args.prompts)


# --- the pipeline -----------------------------------------------------------------------------------------------------------


@dataclass
class Drawing:
    """A pipeline that is ready to draw, and how to call it.

    Attributes:
        native, wanted: ``(height, width)`` that the student was made for, and that is drawn.
        call, start: those of `wadi.pipelines.generate.draw`.
    """

    pipeline: Any
    native: tuple[int, int]
    wanted: tuple[int, int]
    call: dict[str, Any] = field(default_factory=dict)
    start: Any = None

    @contextmanager
    def sized(self, factor: Factor | None, args: Any) -> Iterator[None]:
        """Within the block the pipeline draws at its size as it was asked to."""
        from wadi.extras.high_resolution.resize import enlarged, tiled_decoding

        if args.size is None:
            with tiled_decoding(self.pipeline.vae, args.tiled_vae):
                yield
            return
        tiled, blocks = True if args.tiled_vae else None, args.redilate_blocks
        blocks = "all" if blocks == ["all"] else blocks
        with enlarged(self.pipeline, self.native, self.wanted, factor, blocks, args.disperse, tiled):
            yield


def prepare(pipeline: Any, args: Any, size: tuple[int, int] | None) -> Drawing:
    """Everything that ``args`` asks for put onto a student's ``pipeline``."""
    from wadi.backbones import from_pipeline
    from wadi.extras import image_to_image, steps
    from wadi.extras.high_resolution import resize

    pipeline = customised(pipeline, args)
    backbone = from_pipeline(pipeline)
    native = backbone.resolution
    wanted = native if size is None else resize.drawable(pipeline, size)
    call: dict[str, Any] = {}
    if size is not None:
        resize.resize(pipeline, wanted)
    # Read before the control is loaded: bad input is told at once.
    init = None if args.init is None else image_to_image.read_init(args.init, wanted)
    if args.control is not None:
        pipeline, call = controlled(pipeline, args, wanted)
    schedule = steps.schedule(pipeline.scheduler, args.steps, strength_of(args))
    if args.steps > 1 or init is not None:
        pipeline.scheduler = schedule.scheduler
        call |= schedule.call
    begin = None
    if init is not None:
        with resize.tiled_decoding(pipeline.vae, args.tiled_vae or resize.is_large(wanted)):
            begin = image_to_image.start(backbone, init, schedule)
    return Drawing(pipeline, native, wanted, call, begin)


def customised(pipeline: Any, args: Any) -> Any:
    """``pipeline`` with the tokens and the LoRAs that ``args`` names, each in the order of the command."""
    if args.token is not None:
        from wadi.extras.relation.training import add_token

        for file, name in zip(args.token, args.token_name or [None] * len(args.token), strict=True):
            add_token(pipeline, Path(file), name)
    if args.lora is not None:
        from wadi.extras.lora.apply import apply_lora

        for file, scale in zip(args.lora, numbers(args, "lora_scale", args.lora, 1.0), strict=True):
            apply_lora(pipeline, file, scale)
    return pipeline


def numbers(args: Any, option: str, files: Sequence[str] | None, default: float | None) -> list[Any]:
    """The numbers of an option that is given once for each of ``files``, or its default for each.

    Raises:
        WadiError: if one is not a number or out of bounds.
    """
    bounds: Number | Whole = MODE if option.endswith("_mode") else SCALE
    for text in getattr(args, option) or ():
        bounds.check(option, text)
    return [bounds(text) for text in getattr(args, option) or ()] or [default] * len(files or ())


def controlled(pipeline: Any, args: Any, wanted: tuple[int, int]) -> tuple[Any, dict[str, Any]]:
    """``pipeline`` under every ``--control``, and the arguments of its call."""
    from wadi.extras.control import conditions
    from wadi.extras.control.pipeline import arguments_of_several, is_image_prompt, with_controls
    from wadi.io.images import open_image

    pictures = []
    for file, kind in zip(args.condition, args.condition_from or ["none"] * len(args.condition), strict=True):
        picture = open_image(file, "Condition image")
        if kind != "none":  # lines fade when shrunk: bring the image to size first
            picture = conditions.condition(kind, conditions.fitted(conditions.as_rgb(picture), wanted))
        pictures.append(picture)
    prompts = [is_image_prompt(control) for control in args.control]
    pipeline = with_controls(pipeline, args.control, args.image_encoder)
    scales = numbers(args, "control_scale", args.control, 1.0)
    modes = numbers(args, "control_mode", args.control, None)
    return pipeline, arguments_of_several(pipeline, pictures, scales, prompts, modes)


def student(args: Any) -> Any:
    """The one-step pipeline that ``args`` names."""
    from wadi.pipelines.generate import load

    return load(args.run, adapter=args.adapter, teacher=args.teacher, **place(args))


def place(args: Any) -> dict[str, Any]:
    """``dtype`` and ``device`` as torch has them."""
    from wadi.parallel.device import find_device

    return {"dtype": dtype_of(args.dtype), "device": find_device(args.device)}


def dtype_of(name: str) -> Any:
    """A torch dtype by name."""
    import torch

    if name not in ("float32", "bfloat16", "float16"):
        raise WadiError(f"--dtype is {name!r}. Expected float32, bfloat16 or float16.")
    return getattr(torch, name)
