"""The zoo's exemplar sets show what they are said to show, and the judges tell it from what they do not."""

import json
from pathlib import Path

import pytest
import torch

from relation_scenes import (
    LEARNED,
    RELATIONS,
    TESTED,
    describe,
    extent,
    lay,
    make_exemplars,
    shows_above,
    shows_column,
    shows_edge,
    shows_order,
    write_exemplars,
)
from wadi.errors import WadiError
from wadi.extras.relation.data import read_exemplars
from wadi.extras.relation.training import add_token
from wadi.zoo import load_classifier
from wadi.zoo.concepts import CONCEPTS, STYLES
from wadi.zoo.recipe.icons import Sprites

COMMITTED = Path(__file__).parents[2] / "examples" / "relation"


@pytest.fixture(scope="module")
def sprites():
    """A square of a colour of its own in place of every icon."""
    generator = torch.Generator().manual_seed(0)
    names = [(icon, style) for icon in CONCEPTS.values() for style in STYLES]
    pixels = torch.zeros(len(names), 4, 24, 24, dtype=torch.uint8)
    pixels[:, 3] = 255
    pixels[:, :3] = torch.randint(0, 256, (len(names), 3, 1, 1), generator=generator, dtype=torch.uint8)
    return Sprites(pixels, [icon for icon, _ in names], [style for _, style in names])


def shown(relation, token="<R>"):
    """``(pictures, (first, second) of each)`` of the committed exemplars."""
    found = read_exemplars(COMMITTED / relation, token, (64, 64))
    return found.pictures, [said[0].split(",")[0].split(f" {token}") for said in found.sentences]


def test_a_sprite_lies_where_it_is_laid():
    square = torch.full((2, 4, 32, 32), 255, dtype=torch.uint8)
    ground = torch.zeros(2, 3, 64, 64)
    centre = torch.tensor([[0.25, -0.5], [-0.5, 0.0]])
    found, size = extent(lay(square, torch.tensor([0.5, 0.25]), centre, ground))
    torch.testing.assert_close(found, centre, atol=0.02, rtol=0)
    torch.testing.assert_close(size, torch.tensor([0.5, 0.25]), atol=0.03, rtol=0)


def test_what_is_learned_from_and_what_is_tested_on_share_nothing():
    assert set(LEARNED) | set(TESTED) <= set(CONCEPTS)
    assert not set(LEARNED) & set(TESTED)


@pytest.mark.parametrize("relation", RELATIONS)
def test_exemplars_repeat_and_are_read_back(relation, sprites, tmp_path):
    pictures, texts = make_exemplars(sprites, relation, 5, seed=3)
    again = make_exemplars(sprites, relation, 5, seed=3)
    assert torch.equal(pictures, again[0])
    assert texts == again[1]
    assert texts != make_exemplars(sprites, relation, 5, seed=4)[1]
    write_exemplars(tmp_path / "ex", pictures, texts)
    read = read_exemplars(tmp_path / "ex", "<R>", (64, 64))
    assert read.sentences == [[text] for text in texts]
    torch.testing.assert_close(read.pictures, pictures.clamp(0, 1), atol=1 / 255, rtol=0)


def test_exemplars_of_an_unknown_relation(sprites):
    with pytest.raises(WadiError, match=r"'inside' is not known\. Expected one of above, edge"):
        make_exemplars(sprites, "inside", 2)


def test_the_judge_of_edges_knows_left_from_right():
    pictures, _ = shown("edge", "<edge>")
    assert bool(shows_edge(pictures).all())
    assert not bool(shows_edge(pictures.flip(3)).any())
    assert not bool(shows_edge(pictures.roll(20, 3)).all())  # moved to the middle


def test_the_judges_of_above_know_it_from_its_mirror_and_from_a_row():
    classifier = load_classifier()
    pictures, named = shown("above", "<above>")
    upper, lower = ([name.strip() for name in names] for names in zip(*named, strict=True))
    assert bool((shows_order(classifier, pictures, upper, lower) >= shows_above(classifier, pictures, upper, lower)).all())
    for judge in (shows_above, shows_order):
        assert float(judge(classifier, pictures, upper, lower).float().mean()) > 0.8
        assert not bool(judge(classifier, pictures, lower, upper).any())
    assert float(shows_column(pictures).float().mean()) > 0.8
    assert not bool(shows_column(pictures.transpose(2, 3)).any())


@pytest.mark.parametrize("relation", RELATIONS)
def test_committed_tokens_are_of_the_shipped_teacher(relation):
    """Learned on its exemplars, so that they are less surprising with the token than with the word it started from."""
    from wadi.zoo import load_teacher

    pipeline = load_teacher()
    assert add_token(pipeline, COMMITTED / f"{relation}.safetensors") == f"<{relation}>"
    ids = pipeline.tokenizer(describe(relation, TESTED[:2], f"<{relation}>")).input_ids
    assert ids.count(pipeline.tokenizer.convert_tokens_to_ids(f"<{relation}>")) == 1
    rows = [json.loads(line) for line in (COMMITTED / f"{relation}.jsonl").read_text().splitlines()]
    first, last = (sum(row["denoise"] for row in part) / len(part) for part in (rows[:25], rows[-25:]))
    assert last < first
