"""The page: its fields, and which function each button calls. The functions themselves are in `studio` and `live`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from html import escape
from typing import Any

import gradio as gr

from wadi.app.live import LiveRun, results_html
from wadi.app.models import Source
from wadi.app.request import CONDITION_KINDS, LAST_SEED, NO_CONTROL, TEACHER_STEPS, checked
from wadi.app.studio import Images, Studio, caption
from wadi.errors import WadiError

FIELDS = (
    "prompt", "model", "seed", "count", "width", "height", "steps", "teacher", "teacher_steps", "init", "strength", "control",
    "condition", "condition_kind", "control_scale",
)  # fmt: skip
EVERY = 3.0  # seconds between two looks at a run
WATCHERS = 4  # looks at runs at once
NEW_SEED = "() => Math.floor(Math.random() * 2 ** 31)"
PRIVATE: Any = {"api_visibility": "private"}

CSS = """
.gradio-container { max-width: 1200px !important; margin: 0 auto !important; padding: 0 12px !important }
#generate, #new-seed { align-self: center; max-height: 48px }
.gradio-container h1 { margin: .6rem 0 0 } footer { display: none !important }
#student .grid-wrap, #teacher .grid-wrap { min-height: 0 !important; max-height: none !important }
#student img, #teacher img { image-rendering: pixelated; object-fit: contain }
.wadi-state { font-size: 1.1rem; margin: .3rem 0 }
.wadi-state span { border-radius: 1rem; padding: .1rem .6rem; margin: 0 .4rem; background: #e4e7ec; color: #344054 }
.wadi-running span, .wadi-starting span { background: #d1e9ff; color: #1849a9 }
.wadi-finished span { background: #d1fadf; color: #05603a } .wadi-gone span { background: #fee4e2; color: #912018 }
.wadi-bar { background: #e4e7ec; border-radius: 4px; height: 8px; margin: .4rem 0 }
.wadi-bar div { background: #0072b2; height: 8px; border-radius: 4px }
.wadi-warning { border-left: 4px solid #e69f00; padding: .3rem .6rem; background: #fffaeb; color: #4e1d09 }
.wadi-healthy { color: #067647 }
#live img, #results img, #live svg, #results svg { max-width: 100%; height: auto; background: white }
#live .figures, #results .figures { display: grid; gap: 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)) }
#live figure, #results figure { margin: 0 } #live figcaption, #results figcaption { font-size: .9rem; opacity: .75 }
#live table, #results table { border-collapse: collapse; border: none !important; width: auto; display: block; overflow-x: auto;
  margin: .5rem 0; padding: 0 }
#live td, #live th, #results td, #results th { border: none !important; border-bottom: 1px solid #ccc !important;
  padding: .25rem .8rem .25rem 0; text-align: left }
"""
log = logging.getLogger("wadi.app")


def build(studio: Studio) -> gr.Blocks:
    """Return the page for the students of ``studio``."""
    sources = list(studio.models.sources.values())
    runs = {source.name: LiveRun(source.folder) for source in sources if source.is_run and source.folder is not None}
    with gr.Blocks(title="wadi", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown("# wadi\nImages in one step, beside the teacher that needs many.")
        with gr.Tab("Generate"):
            _generate_tab(studio, sources)
        with gr.Tab("Training") as training:
            _training_tab(runs, training)
        with gr.Tab("Analysis") as analysis:
            _analysis_tab(studio, sources, analysis)
        _add_api(studio, runs)
    return page


# --- generate ---------------------------------------------------------------------------------------------------------------


def _generate_tab(studio: Studio, sources: list[Source]) -> None:
    limits, names = studio.limits, [source.name for source in sources]
    controls = studio.controls_of(names[0])
    inputs: dict[str, Any] = {}
    with gr.Row(equal_height=True):
        inputs["prompt"] = gr.Textbox(
            label="Prompt", lines=1, max_lines=4, max_length=limits.prompt, elem_id="prompt", scale=5, min_width=260,
            value="red apple" if sources[0].folder is None else None, placeholder="What the image should show",
        )  # fmt: skip
        run = gr.Button("Generate", variant="primary", elem_id="generate", min_width=110)
        again = gr.Button("New seed", elem_id="new-seed", min_width=110)
    with gr.Row(equal_height=False):
        with gr.Column(scale=7, min_width=280):
            head = gr.HTML(_head([]), elem_id="times")
            with gr.Row(equal_height=False):
                student, teacher = _gallery("Student", "student"), _gallery("Teacher", "teacher")
            details = gr.JSON(visible=False, label="Seeds and times")
        with gr.Column(scale=4, min_width=280):
            inputs["model"] = gr.Dropdown(names, value=names[0], label="Model", visible=len(names) > 1, elem_id="model")
            with gr.Row():
                inputs["seed"] = gr.Number(0, label="Seed", precision=0, min_width=90, elem_id="seed")
                count = f"Images (1 to {limits.count})"
                inputs["count"] = gr.Number(min(4, limits.count), label=count, precision=0, min_width=90, elem_id="count")
            with gr.Row():
                inputs["teacher"] = gr.Checkbox(True, label="Teacher beside", min_width=90, elem_id="beside")
                inputs["teacher_steps"] = gr.Number(TEACHER_STEPS, label="Teacher's steps", precision=0, min_width=90)
            with gr.Accordion("Size and steps", open=False, elem_id="more"):
                gr.Markdown("0 = as the student was trained. The teacher is shown at its own size only.")
                with gr.Row():
                    inputs["width"] = gr.Number(0, label="Width", precision=0, min_width=80, elem_id="width")
                    inputs["height"] = gr.Number(0, label="Height", precision=0, min_width=80, elem_id="height")
                    inputs["steps"] = gr.Number(0, label="Steps", precision=0, min_width=80, elem_id="steps")
            with gr.Accordion("Start from an image", open=False, elem_id="image-to-image"):
                inputs["init"] = _upload_field("Start image", "init")
                inputs["strength"] = gr.Slider(0.05, 1, 0.8, step=0.05, label="How far to leave it")
            with gr.Accordion("Control", open=False, visible=bool(studio.controls), elem_id="controls"):
                inputs["control"] = gr.Dropdown([NO_CONTROL, *controls], value=NO_CONTROL, label="Control", elem_id="control")
                inputs["condition"] = _upload_field("Image for the control", "condition")
                inputs["condition_kind"] = gr.Dropdown(
                    list(CONDITION_KINDS), value="canny", label="Turn the image into (none = it is a condition already)"
                )
                inputs["control_scale"] = gr.Slider(0, 2, 1, step=0.1, label="Strength of the control")
    if any(source.folder is None for source in sources):
        from wadi.zoo.prompts import fixed_prompts

        gr.Examples(fixed_prompts(), inputs["prompt"], label="Prompts of the embedded model", **PRIVATE)

    function = _generator(studio)
    fields, outputs = [inputs[name] for name in FIELDS], [head, student, teacher, details]
    shared: Any = {"concurrency_limit": 1, "concurrency_id": "generate", "show_progress_on": [student]}
    gr.on([run.click, inputs["prompt"].submit], function, fields, outputs, api_name="generate", **shared)
    again.click(None, None, inputs["seed"], js=NEW_SEED, **PRIVATE).then(function, fields, outputs, **shared, **PRIVATE)
    inputs["teacher"].change(lambda on: gr.Gallery(visible=on), inputs["teacher"], teacher, **PRIVATE)
    for upload in ("init", "condition"):  # the teacher takes no image
        inputs[upload].upload(None, None, inputs["teacher"], js="() => false", **PRIVATE)
    inputs["model"].change(
        lambda name: gr.Dropdown([NO_CONTROL, *studio.controls_of(name)], value=NO_CONTROL),
        inputs["model"], inputs["control"], **PRIVATE,
    )  # fmt: skip


def _generator(studio: Studio) -> Callable[..., Iterator[tuple[Any, ...]]]:
    def generate(*values: Any) -> Iterator[tuple[Any, ...]]:
        """Generate images of a prompt: first the student's, then, if wanted, the teacher's."""
        request = _call(checked, dict(zip(FIELDS, values, strict=True)), studio.limits)
        student = _call(studio.student, request)
        found = [("Student", student)]
        details = {"model": request.model, "seeds": student.seeds, "student_steps": student.steps, "student_ms": student.ms}
        yield _head(found, waiting=request.teacher_steps is not None), _captioned(student), None, details
        if request.teacher_steps is not None:
            teacher = _call(studio.teacher, request)
            found.append(("Teacher", teacher))
            details |= {"teacher_steps": teacher.steps, "teacher_ms": teacher.ms}
            yield _head(found), _captioned(student), _captioned(teacher), details

    return generate


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return ``function(*arguments)``. Show its errors on the page: bad input in full, of anything else the type."""
    try:
        return function(*arguments)
    except WadiError as error:
        raise gr.Error(escape(str(error), quote=False), print_exception=False) from None
    except Exception as error:
        log.exception("A request failed unexpectedly.")
        message = f"Unexpected failure ({type(error).__name__}). The server's terminal shows the details."
        raise gr.Error(message, print_exception=False) from None


def _captioned(images: Images) -> list[tuple[Any, str]]:
    return [(image, f"seed {seed}") for image, seed in zip(images.images, images.seeds, strict=True)]


def _head(found: list[tuple[str, Images]], waiting: bool = False) -> str:
    """Return the line above the galleries: the times of both generators, and how many times as fast the student is."""
    if not found:
        return "<p>Choose a prompt and press Generate. The first images take longer: the model is loaded.</p>"
    lines = [escape(caption(title, images)) for title, images in found]
    if len(found) == 2 and found[0][1].ms:
        lines[0] += f" — <b>{found[1][1].ms / found[0][1].ms:.1f} times as fast</b>"
    if waiting:
        lines.append("Teacher: generating ...")
    return f"<p>{'<br>'.join(lines)}</p>"


def _gallery(label: str, name: str) -> gr.Gallery:
    return gr.Gallery(
        label=label, format="png", columns=2, min_width=200, height="auto", object_fit="contain", elem_id=name,
        buttons=["download", "fullscreen"], interactive=False,
    )  # fmt: skip


def _upload_field(label: str, name: str) -> gr.Image:
    """Return an image field that hands on the path of the uploaded file unopened: `wadi.io.images` is the only reader.

    Gradio has checked by then that the path lies in its upload folder. A subclass would make Gradio write into this package.
    """
    field = gr.Image(label=label, type="filepath", image_mode=None, sources=["upload", "clipboard"], height=220, elem_id=name)
    move = field.async_move_resource_to_block_cache

    def preprocess(payload: Any) -> Any:
        if payload is not None and (not payload.path or str(payload.url or "").startswith("data:")):
            raise gr.Error("Upload the image as a file.", print_exception=False)
        return None if payload is None else payload.path

    async def uploads_only(source: Any) -> Any:
        if str(source).lower().startswith(("http:", "https:")):  # Gradio would download it
            raise gr.Error("Upload the image as a file. Addresses are not fetched.", print_exception=False)
        return await move(source)

    field.preprocess, field.async_move_resource_to_block_cache = preprocess, uploads_only
    return field


# --- training and analysis --------------------------------------------------------------------------------------------------


def _training_tab(runs: dict[str, LiveRun], tab: gr.Tab) -> None:
    if not runs:
        gr.Markdown("No run is shown. Start the page with the folder of one: `wadi app runs/mine`. It may still be training.")
        return
    chosen = gr.Dropdown(list(runs), value=next(iter(runs)), label="Run", visible=len(runs) > 1, elem_id="run")
    shown, seen = gr.HTML(elem_id="live"), gr.State(None)

    def look(name: str, before: Any) -> tuple[Any, Any]:
        _, html = _call(_call(_run, runs, name).html)
        stamp = (name, hash(html))
        return (gr.skip(), before) if stamp == before else (html, stamp)

    # "once": a slow look at the folder never queues up behind itself
    options: Any = {"concurrency_limit": WATCHERS, "concurrency_id": "look", "show_progress": "hidden", "trigger_mode": "once"}
    for event in (gr.Timer(EVERY).tick, tab.select, chosen.change):
        event(look, [chosen, seen], [shown, seen], **options, **PRIVATE)


def _run(runs: dict[str, LiveRun], name: str) -> LiveRun:
    if name not in runs:
        raise WadiError(f"There is no run {name[:80]!r}. Choose one of {', '.join(runs) or 'none'}.")
    return runs[name]


def _analysis_tab(studio: Studio, sources: list[Source], tab: gr.Tab) -> None:
    names = [source.name for source in sources]
    chosen = gr.Dropdown(names, value=names[0], label="Model", visible=len(names) > 1, elem_id="analysed")
    shown = gr.HTML(elem_id="results")

    def show(name: str) -> str:
        from wadi.app.analysis import embedded_html

        source = _call(studio.models.source, name)
        if source.folder is None:
            return str(_call(embedded_html))
        found = results_html(source.folder)
        where = escape(str(source.folder))
        commands = f"<code>wadi analyze TEACHER {where} --out {where}/analysis</code>, <code>wadi eval {where}</code>"
        return found or f"<p>This model has no results yet. These commands write them into its folder: {commands}.</p>"

    for event in (tab.select, chosen.change):
        event(show, chosen, shown, concurrency_limit=1, concurrency_id="analyse", **PRIVATE)


# --- for programs -----------------------------------------------------------------------------------------------------------


def _add_api(studio: Studio, runs: dict[str, LiveRun]) -> None:
    limits = studio.limits

    def models() -> dict[str, Any]:
        """Return the names of the models, their controls, and the bounds on a request."""
        return {
            "models": {name: {"controls": studio.controls_of(name), "run": name in runs} for name in studio.models.sources},
            "limits": {"prompt": limits.prompt, "count": limits.count, "steps": limits.steps, "seed": LAST_SEED},
        }

    def run(name: str) -> dict[str, Any]:
        """Return where a run is: state, step, steps, seconds left, the last value of each statistic, warnings."""
        status = _call(_call(_run, runs, name).status)
        return {**vars(status), "warnings": list(status.warnings)}

    gr.api(models, api_name="models", concurrency_limit=WATCHERS, concurrency_id="look")
    gr.api(run, api_name="run", concurrency_limit=WATCHERS, concurrency_id="look")
