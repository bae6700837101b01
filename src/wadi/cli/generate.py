"""``wadi generate``: images of a one-step student."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from wadi.cli.generate_checks import check_conflicts, check_memory, check_output
from wadi.cli.generate_options import add_options, composition_from, size_from
from wadi.cli.scaled import split_scales
from wadi.errors import WadiError

if TYPE_CHECKING:
    from wadi.cli.parser import Arguments
    from wadi.pipelines.compose import Composed

__all__ = ["add_options", "run"]


def run(arguments: Arguments) -> int:
    """Generate the images; with ``--prompts`` the same command continues an interrupted one."""
    options = arguments.options
    split_scales(options)
    check_conflicts(options)
    prompts, size = _read_prompts(options), size_from(options.size)
    composition = composition_from(options, size)
    in_folder, out = options.prompts is not None and not options.compare, _output_path(options)
    from wadi.pipelines.compose import compose
    from wadi.pipelines.files import Folder, generate_file, generate_folder, plan_images

    images = plan_images(prompts, options.seed, options.count)
    check_output(options, out, in_folder)
    folder = Folder()
    if in_folder:
        from wadi.cli.generate_settings import image_settings
        from wadi.io import image_folder

        folder = Folder(image_settings(options), options.overwrite)
        if not image_folder.missing_images(out, images, folder.settings, folder.overwrite):
            print(f"All {len(images)} images are there already: {out}")
            return 0
    if size is not None:
        check_memory(size, min(options.batch, len(images)), _place(options)["device"])
    composed = compose(load_student(options), composition)
    with composed.at_size():
        if options.compare:
            return _compare(composed, prompts, out, options)
        sampling = composed.sampling(options.batch)
        if in_folder:
            files = generate_folder(composed.pipeline, images, out, sampling, folder)
        else:
            files = generate_file(composed.pipeline, images, out, sampling)
    existing = f", {files.existing} of them there already" if files.existing else ""
    print(f"{len(files.paths)} image(s){existing}, {files.ms_per_image:.0f} ms each: {out}")
    return 0


def _compare(composed: Composed, prompts: list[str], out: Path, options: Any) -> int:
    """Write the teacher's many-step images above the student's, and print the times of both."""
    from wadi.backbones import from_pipeline
    from wadi.extras.high_resolution.resize import tiled_decoding
    from wadi.io.grids import save_png
    from wadi.pipelines.compare import compare_with_teacher
    from wadi.pipelines.compose import customise
    from wadi.pipelines.generate import Sampling
    from wadi.pipelines.load import load_teacher_pipeline
    from wadi.sampling import check_steps

    teacher = load_teacher_pipeline(options.run, adapter=options.adapter, teacher=options.teacher, **_place(options))
    customise(teacher, composed.composition.tokens, composed.composition.loras)
    columns = [prompt for prompt in prompts for _ in range(options.count)]
    seeds = [options.seed + i for i in range(len(columns))]
    steps = 25 if options.teacher_steps is None else options.teacher_steps
    backbone = from_pipeline(teacher)
    check_steps(backbone, steps, "--teacher-steps")
    slow = Sampling(steps, backbone.teacher_guidance(options.guidance_scale, 2.0), options.batch)
    with tiled_decoding(teacher.vae, options.tiled_vae):
        result = compare_with_teacher(composed.pipeline, teacher, columns, seeds, composed.sampling(options.batch), slow)
    save_png(result.image, out)
    print(
        f"teacher {result.teacher_ms:.0f} ms, student {result.student_ms:.0f} ms per image, "
        f"{result.teacher_ms / result.student_ms:.1f} times as fast: {out}"
    )
    return 0


def load_student(options: Any) -> Any:
    """Load the student's pipeline that ``--run``, ``--adapter`` and ``--teacher`` name."""
    from wadi.pipelines.load import load

    return load(options.run, adapter=options.adapter, teacher=options.teacher, **_place(options))


def _place(options: Any) -> dict[str, Any]:
    from wadi.parallel.device import dtype_of, find_device

    return {"dtype": dtype_of(options.dtype), "device": find_device(options.device)}


def _output_path(options: Any) -> Path:
    """Return the image file, or the folder for a file of prompts. A comparison of the latter is an image in that folder."""
    return Path(options.out) / "compare.png" if options.compare and options.prompts is not None else Path(options.out)


def _read_prompts(options: Any) -> list[str]:
    from wadi.prompts.reading import read_prompts

    if (options.prompt is None) == (options.prompts is None):
        given = "neither" if options.prompt is None else "both"
        raise WadiError(f"Give either a prompt or --prompts FILE. Received {given}.")
    return [options.prompt] if options.prompt is not None else read_prompts(options.prompts)
