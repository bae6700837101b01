"""Captions name concept, style and background, and the fixed lists do not change."""

import subprocess
import sys

from wadi.zoo import COLOURS, CONCEPTS, STYLES, caption, concept_of, eval_prompts, fixed_prompts, training_prompts


def test_there_are_at_least_a_hundred_concepts_in_three_styles():
    assert len(CONCEPTS) >= 100
    assert len(STYLES) == 3
    assert len(set(CONCEPTS.values())) == len(CONCEPTS)
    assert {"red apple", "pizza", "rocket", "cat face"} <= set(CONCEPTS)


def test_caption_reads_as_a_sentence_part():
    assert caption("pizza") == "pizza"
    assert caption("pizza", "noto") == "pizza, noto style"
    assert caption("pizza", None, "orange") == "pizza, on an orange background"
    assert caption("pizza", "fluent", "blue") == "pizza, fluent style, on a blue background"


def test_training_prompts_are_every_combination_once():
    prompts = training_prompts()
    assert len(prompts) == len(set(prompts)) == len(CONCEPTS) * (1 + len(STYLES)) * (1 + len(COLOURS))
    assert {concept_of(prompt) for prompt in prompts} == set(CONCEPTS)


def test_evaluation_has_every_concept_equally_often():
    rows = eval_prompts()
    assert len(rows) == 512
    assert rows == eval_prompts()
    assert all(concept_of(prompt) == concept for prompt, concept, _ in rows)
    counts = [sum(concept == name for _, concept, _ in rows) for name in CONCEPTS]
    assert max(counts) - min(counts) <= 1
    assert len({seed for *_, seed in rows}) == 512


def test_fixed_prompts_are_in_the_language():
    assert len(fixed_prompts()) == 12
    assert set(fixed_prompts()) <= set(training_prompts())


def test_importing_the_zoo_imports_neither_torch_nor_diffusers():
    code = "import sys, wadi.zoo; print([m for m in ('torch', 'diffusers', 'transformers', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
