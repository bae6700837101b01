"""A small study."""

import pytest


@pytest.fixture
def contents(sd_folder, prompts_path):
    """The contents of a study of two ranks and two seeds, some seconds a run."""
    base = {
        "teacher": str(sd_folder), "prompts": str(prompts_path), "steps": 2, "batch": 2, "device": "cpu", "sample_every": 0,
        "checkpoint_every": 1, "sample_prompts": ["red apple"], "sample_seeds": 1, "teacher_steps": 1, "fake.rank": 2,
        "student.lr": 1e-3, "student.rank": 2,
    }  # fmt: skip
    evaluation = {
        "protocol": str(prompts_path), "reference": "teacher", "metrics": ["fd"], "features": "zoo", "size": 32,
        "teacher_steps": 1,
    }  # fmt: skip
    return {"base": base, "grid": {"student.rank": [2, 4]}, "seeds": [0, 1], "eval": evaluation}
