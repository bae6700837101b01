"""Pretended commands of a study, which leave small results and take no time."""

import json
from functools import partial
from pathlib import Path

from wadi.distill.config_files import load_config, save_config
from wadi.evaluate.result import Number, Result, Row
from wadi.study.engines import run_here

SECONDS = (1.0, 2.0, 5.0)  # of a step of the warm start, of the fake model alone, and of both


def pretended(calls=None, score=lambda config: config.student.rank + config.seed / 10):
    """Run commands that only leave results: a step takes `SECONDS`, the distance is ``score`` of the settings.

    A run whose layers are "nothing" fails.
    """

    def execute(words, log):
        if calls is not None:
            calls.append((words[0], log.stem))
        if words[0] == "eval":
            row = Row("student", {}, 4, {"fd zoo": Number(score(load_config(Path(words[1]) / "config.yaml")))})
            Result({"metrics": "fd"}, [row]).save(Path(words[words.index("--out") + 1]))
            return 0
        if words[0] == "analyze":
            return 0
        config = load_config(Path(words[2]))
        if config.student.target_modules == "nothing":
            log.parent.mkdir(exist_ok=True)
            log.write_text("wadi: no layer is called nothing\n")
            return 2
        run, total, lines = Path(config.out), 0.0, []
        for step in range(config.steps):
            warm = config.warm_start
            total += SECONDS[(step >= warm.steps) + (step >= warm.steps + warm.fake_steps)]
            lines.append(json.dumps({"step": step + 1, "seconds": total}))
        save_config(config, run / "config.yaml")
        if config.warm_start.pairs and not (run / "warm_start.safetensors").exists():
            (run / "warm_start.safetensors").write_bytes(str(config.seed).encode())
        (run / "stats.jsonl").write_text("\n".join(lines) + "\n")
        return 0

    return partial(run_here, execute=execute)
