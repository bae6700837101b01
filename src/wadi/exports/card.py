"""The card of an export, ``README.md``: how to load it, how it was checked, the settings, the metrics and the licence.

Nothing in it says where its builder keeps files: of folders only their name, of settings no text with a path.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wadi import __version__
from wadi.backbones.hub import is_hub_id
from wadi.distill.report.results import Result
from wadi.errors import WadiError
from wadi.exports.source import Source, licence_of
from wadi.exports.written import Difference, Written
from wadi.io import markdown
from wadi.io.metric_names import metric_label
from wadi.io.records import flatten, read_json

IMAGES = "images.png"
CARD = "README.md"
# Settings of a run that say where and how it ran, not what came out.
_PRIVATE = {"out", "teacher", "prompts", "device", "tracker", "sample_prompts"}


def card(source: Source, written: Written, check: Difference) -> str:
    """Return the text of ``README.md``."""
    licence = source.licence or licence_of(source.teacher_source)
    base = markdown.code_span(source.base_name)
    prompts, seeds = source.requests()
    rows = [(markdown.escape(prompt), seed) for prompt, seed in zip(prompts, seeds, strict=True)]
    parts = [
        f"---\n{_metadata(source, written, licence)}\n---",
        f"# {written.title}",
        f"```python\n{written.code}```",
        *written.sections,
        "## Check",
        f"After writing, {written.reader} loaded these files and generated the prompts below. Difference to the student's own "
        f"images: {check}.",
        f"![The student's images above, those of this export below]({IMAGES})",
        markdown.table(("prompt", "seed"), rows),
        *_settings(source),
        *_metrics(source),
        "## Licence",
        f"The weights are derived from {base}"
        + (f", whose licence is {markdown.code_span(licence)}." if licence else ". Its licence applies: see its own page.")
        + f" Written by wadi {__version__}.",
    ]
    return "\n\n".join(parts) + "\n"


def _metadata(source: Source, written: Written, licence: str | None) -> str:
    """Return what the Hub reads, as YAML."""
    from huggingface_hub import ModelCardData

    steps = written.data.get("steps", 1)
    card_data = ModelCardData(
        base_model=source.base_name if is_hub_id(source.base_name) else None,
        library_name=written.library,
        license=(licence or "other").lower(),
        pipeline_tag="text-to-image",
        tags=["wadi", "one-step" if steps == 1 else "few-step", *written.tags],
    )
    return str(card_data.to_yaml())


def _settings(source: Source) -> list[str]:
    """Return the table of the run's settings; nothing for an adapter or a merged pipeline."""
    rows = [(f"`{name}`", markdown.escape(value)) for name, value in public_settings(source.settings()).items()]
    return ["## Settings of the training", markdown.table(("setting", "value"), rows)] if rows else []


def public_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run without those that may hold a path."""
    flat = {name: value for name, value in flatten(settings).items() if name not in _PRIVATE and value is not None}
    return {name: value for name, value in flat.items() if not any(mark in str(value) for mark in ("/", "\\", "~"))}


def _metrics(source: Source) -> list[str]:
    """Return a table for each result of ``wadi eval`` in the run's folder ``eval``."""
    tables = []
    for path in sorted(Path(source.run).glob("eval/*.json")) if source.run is not None else ():
        try:
            result: Result = read_json(path, Result)
        except WadiError:
            continue  # `wadi report` reports damaged results
        names = list(dict.fromkeys(name for row in result.rows for name in row.metrics))
        rows = [
            (markdown.escape(Path(row.name).name), row.images, *(_number(row.metrics.get(name)) for name in names))
            for row in result.rows
        ]
        tables.append(markdown.table(("generator", "images", *map(metric_label, names)), rows))
    return ["## Metrics", *tables] if tables else []


def _number(metric: Any) -> str:
    if metric is None:
        return ""
    return f"{metric.value:.4g}" + (f" ± {metric.std:.2g}" if metric.std is not None else "")
