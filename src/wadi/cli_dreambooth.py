"""``wadi dreambooth``: teach the teacher one subject from a few pictures, and let its one-step student draw it."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wadi import bounds
from wadi.errors import WadiError

if TYPE_CHECKING:
    from PIL import Image

    from wadi.backbones import Backbone
    from wadi.downstream.dreambooth import DreamboothConfig
    from wadi.downstream.dreambooth_data import Prior

# By method: the rank at which LoRaD and LoRA train about as many numbers, and learning rates that docs/dreambooth.md measured
# on the embedded models; elsewhere LoRA's and full weights' are what DreamBooth trainings use,
# LoRaD's is that of the paper's student.
RANKS = {"lorad": 16, "lora": 10, "full": 1}
RATES = {"lorad": 1e-4, "lora": 1e-4, "full": 5e-6}
EMBEDDED_RATES = {"lorad": 4e-3, "lora": 1e-3, "full": 2e-4}
COLUMNS = 4  # of the picture
GUIDANCE = 2.5  # of a teacher's many steps, unless the family has its own


def run(argv: Sequence[str], parse: Callable[..., Any], make_parser: Callable[[str], Any]) -> int:
    """Run the command; ``parse`` and ``make_parser`` are the command line's own."""
    args = parse(_options(make_parser("dreambooth")), argv)
    out = Path(args.out)
    _refuse_conflicts(args, out)
    from wadi.backbones import from_pipeline, refuse_distilled
    from wadi.device import find_device, keep_freed_memory
    from wadi.downstream import dreambooth
    from wadi.downstream.dreambooth_data import check_subject, read_subject
    from wadi.sampling import check_steps

    config = _config(args)
    check_subject(Path(args.subject))  # complain before a model is loaded
    _refuse_carry(args)
    keep_freed_memory()
    device = find_device(args.device)
    pipeline = _pipeline(args, device)
    backbone = from_pipeline(pipeline)
    if args.student is None:
        refuse_distilled(pipeline, backbone.network)
        check_steps(backbone, args.prior_steps, "--prior_steps")
    dreambooth.check(backbone, config)
    subject, shown = read_subject(Path(args.subject), backbone.resolution)
    condition = backbone.encode([args.prompt])
    prior = _prior(args, backbone)
    rows = [("the subject", shown)]
    if args.picture:
        rows.append(("before", _draw(pipeline, args)))
    trained = dreambooth.train(backbone, backbone.encode_images(subject), condition, prior, config)
    dreambooth.save(pipeline, backbone, config, out, _about(args, config, trained.parameters))
    print(
        f"{trained.parameters:,} numbers trained in {trained.seconds:.0f} s, "
        f"loss {trained.losses[0]:.3g} to {trained.losses[-1]:.3g}"
    )
    if args.picture:
        print(f"picture  {_show(args, pipeline, rows, out, device)}")
    print(f"{_KIND[config.method]}  {out}\n{_how(args, config.method, out)}")
    return 0


_KIND = {"lorad": "adapter", "lora": "adapter", "full": "pipeline"}


def _options(parser: Any) -> Any:
    add = parser.add_argument
    add("--subject", type=str, required=True, help="folder with a few pictures of one subject")
    add("--prompt", type=str, required=True, help='what they are called from now on, with a rare word: "sks apple"')
    add("--out", type=str, required=True, help="folder to write; must not exist")
    add("--teacher", type=str, default=None, help="many-step pipeline to train: folder, Hub id or zoo")
    add("--student", type=str, default=None, help="train this one-step model itself instead: run, exported pipeline or zoo")
    add("--method", type=str, default="lorad", help="lorad, lora or full")
    add("--loss", type=str, default=None, help="diffusion or one-step; default: one-step with --student")
    add(
        "--rank",
        type=bounds.RANK,
        default=None,
        help=f"of the adapter; default: {RANKS['lorad']} for lorad, {RANKS['lora']} for lora",
    )
    add("--target_modules", type=str, default=None, help="regular expression; default: the layers of the family's students")
    add("--lr", type=bounds.RATE, default=None, help="learning rate; default: by method")
    add("--steps", type=bounds.UPDATES, default=200, help="updates")
    add("--batch", type=bounds.BATCH, default=4, help="pictures of the subject per update, and as many of the class")
    add(
        "--prior_prompt", type=str, nargs="+", default=None, help="prompts of the class, whose pictures are to stay as they are"
    )
    add("--prior_weight", type=bounds.Number(0, 1000), default=None, help="of the class's loss; default: 1")
    add("--prior_count", type=bounds.COUNT, default=32, help="pictures of the class, drawn by the model itself")
    add("--prior_steps", type=bounds.STEPS, default=25, help="steps in which a teacher draws them, and the picture")
    add(
        "--guidance_scale",
        type=bounds.GUIDANCE,
        default=None,
        help="guidance with which it does; default: 2.5, for FLUX 1 (none)",
    )
    add("--carry", type=str, default=None, help="student to show with the teacher's adapter; default: zoo for zoo, else none")
    add("--picture", type=bool, default=True, help="draw OUT/picture.png: the subject, before, after")
    add("--seed", type=bounds.SEED, default=0, help="of everything that is drawn")
    add("--dtype", type=str, default="float32", help="of the frozen weights: float32, bfloat16 or float16")
    add("--device", type=str, default=None, help="cpu, cuda, cuda:1, ...; default: the best there is")
    return parser


def _refuse_conflicts(args: Namespace, out: Path) -> None:
    """Raise `WadiError` for options that contradict each other, before anything is loaded."""
    from wadi.files import check_out

    if (args.teacher is None) == (args.student is None):
        raise WadiError(
            "Expected one of --teacher (train the many-step model; its student takes the adapter) and --student (train the "
            f"one-step model itself), and received {'neither' if args.teacher is None else 'both'}."
        )
    if args.loss == "one-step" and args.student is None:
        raise WadiError("--loss one-step is that of a one-step model. Expected --student, or --loss diffusion.")
    if args.prior_prompt is None and args.prior_weight is not None:
        raise WadiError("--prior_weight weighs pictures of the class. Expected --prior_prompt too: which class.")
    if args.method == "full" and (args.rank is not None or args.target_modules is not None):
        raise WadiError("--rank and --target_modules are of adapters. Expected neither with --method full.")
    if args.method == "full" and args.dtype != "float32":
        raise WadiError(f"--method full trains the weights, which --dtype {args.dtype} would round. Expected float32.")
    if args.carry is not None and (args.student is not None or args.method == "full"):
        raise WadiError("--carry shows an adapter of the teacher on a student. Expected --teacher, and --method lorad or lora.")
    check_out(out)


def _refuse_carry(args: Namespace) -> None:
    """Raise `WadiError` if ``--carry``, which is loaded after the training, names no student."""
    if args.carry is not None and args.carry != "zoo" and not (Path(args.carry) / "model_index.json").is_file():
        from wadi.generate import about_of, locate

        about_of(locate(args.carry, None, None)[0])


def _config(args: Namespace) -> DreamboothConfig:
    from wadi.downstream.dreambooth import DreamboothConfig
    from wadi.presets import preset

    embedded = "zoo" in (args.teacher, args.student)
    rates = EMBEDDED_RATES if embedded else RATES
    targets = args.target_modules or (preset("zoo").student.target_modules if embedded else None)
    return DreamboothConfig(
        method=args.method,
        rank=RANKS.get(args.method, 1) if args.rank is None else args.rank,
        target_modules=targets,
        lr=rates.get(args.method, 1e-4) if args.lr is None else args.lr,
        steps=args.steps,
        batch=args.batch,
        prior_weight=1.0 if args.prior_weight is None else args.prior_weight,
        loss=args.loss or ("diffusion" if args.student is None else "one-step"),
        seed=args.seed,
    )


def _pipeline(args: Namespace, device: Any) -> Any:
    from wadi.backbones import load_pipeline
    from wadi.embedded import resolve_teacher

    if args.student is not None:
        return _one_step(args.student, args, device)
    return load_pipeline(resolve_teacher(args.teacher), _dtype(args), device)


def _one_step(student: str, args: Namespace, device: Any) -> Any:
    from wadi.generate import load

    return load(None if student == "zoo" else student, dtype=_dtype(args), device=device)


def _dtype(args: Namespace) -> Any:
    import torch

    if args.dtype not in ("float32", "bfloat16", "float16"):
        raise WadiError(f"--dtype is {args.dtype!r}. Expected float32, bfloat16 or float16.")
    return getattr(torch, args.dtype)


def _prior(args: Namespace, backbone: Backbone) -> Prior | None:
    from wadi.downstream.dreambooth_data import draw_prior

    if args.prior_prompt is None:
        return None
    steps = args.prior_steps if args.student is None else 0
    guidance = backbone.teacher_guidance(args.guidance_scale, GUIDANCE)
    return draw_prior(backbone, args.prior_prompt, args.prior_count, args.seed, steps, guidance)


def _about(args: Namespace, config: DreamboothConfig, parameters: int) -> dict[str, Any]:
    from dataclasses import asdict

    told = ("teacher", "student", "prompt", "prior_prompt", "prior_count")
    return {"dreambooth": {name: getattr(args, name) for name in told} | asdict(config) | {"parameters": parameters}}


# --- what it looks like -----------------------------------------------------------------------------------------------------


def _draw(pipeline: Any, args: Namespace, steps: int | None = None) -> list[Image.Image]:
    """`COLUMNS` pictures of the subject's prompt: a teacher's in many steps, a student's in one."""
    from wadi.backbones import from_pipeline
    from wadi.generate import draw

    seeds = [args.seed + i for i in range(COLUMNS)]
    steps = steps or (args.prior_steps if args.student is None else 1)
    guidance = from_pipeline(pipeline).teacher_guidance(args.guidance_scale, GUIDANCE) if steps > 1 else None
    return draw(pipeline, [args.prompt] * COLUMNS, seeds, steps, guidance).pictures


def _show(args: Namespace, pipeline: Any, rows: list[tuple[str, Any]], out: Path, device: Any) -> Path:
    """Write ``picture.png``: the subject, the model before and after, the one-step model with the adapter."""
    from wadi import images
    from wadi.downstream.lora import apply_lora
    from wadi.generate import enlargement

    rows = [*rows, ("after", _draw(pipeline, args))]
    carry = args.carry or ("zoo" if args.teacher == "zoo" and args.method != "full" else None)
    if carry is not None:
        student = _one_step(carry, args, device)
        apply_lora(student, out)
        rows.append(("its student,\none step", _draw(student, args, steps=1)))
    pictures = [(row * COLUMNS)[:COLUMNS] if len(row) < COLUMNS else row[:COLUMNS] for _, row in rows]
    path = out / "picture.png"
    images.save_png(images.grid(pictures, [label for label, _ in rows], scale=enlargement(pictures[0][0])), path)
    return path


def _how(args: Namespace, method: str, out: Path) -> str:
    if args.student is not None:
        run = "" if args.student == "zoo" else f" --run {args.student}"
        return f'draw     wadi generate "{args.prompt}"{run}' + (f" --lora {out}" if method != "full" else f" --run {out}")
    if method == "full":
        return f'draw     wadi generate "{args.prompt}" --adapter STUDENT --teacher {out}'
    return f'draw     wadi generate "{args.prompt}" --lora {out}    (with --run RUN for another student than the embedded one)'
