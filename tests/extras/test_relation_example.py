"""The exemplars in examples/relation show their relation, and the judges of the example recognise it."""

from pathlib import Path

import pytest
import torch

from raising import raises_naming
from relation_scenes import (
    LEARNED,
    RELATIONS,
    TESTED,
    describe,
    extent,
    make_exemplars,
    put,
    shows_above,
    shows_column,
    shows_edge,
    shows_order,
    write_exemplars,
)
from wadi.backbones import from_pipeline
from wadi.extras.relation import loop
from wadi.extras.relation.config import RelationConfig
from wadi.extras.relation.exemplars import read_exemplars
from wadi.extras.relation.loop import TokenTraining
from wadi.extras.relation.token_file import add_token, read_token
from wadi.extras.relation.vocabulary import embeddings_of, replaced_embeddings
from wadi.zoo import load_classifier
from wadi.zoo.concepts import CONCEPTS, STYLES
from wadi.zoo.recipe.icons import Sprites

COMMITTED = Path(__file__).parents[2] / "examples" / "relation"


@pytest.fixture(scope="module")
def sprites():
    """A square of another colour in place of every icon."""
    generator = torch.Generator().manual_seed(0)
    names = [(icon, style) for icon in CONCEPTS.values() for style in STYLES]
    pixels = torch.zeros(len(names), 4, 24, 24, dtype=torch.uint8)
    pixels[:, 3] = 255
    pixels[:, :3] = torch.randint(0, 256, (len(names), 3, 1, 1), generator=generator, dtype=torch.uint8)
    return Sprites(pixels, [icon for icon, _ in names], [style for _, style in names])


def committed_exemplars(relation, token="<R>"):
    """Return ``(images, (first, second thing) of each)`` of the committed exemplars."""
    exemplars = read_exemplars(COMMITTED / relation, token, (64, 64))
    return exemplars.images, [sentences[0].split(",")[0].split(f" {token}") for sentences in exemplars.sentences]


def test_a_sprite_is_where_it_was_put():
    square = torch.full((2, 4, 32, 32), 255, dtype=torch.uint8)
    ground = torch.zeros(2, 3, 64, 64)
    centre = torch.tensor([[0.25, -0.5], [-0.5, 0.0]])
    measured, size = extent(put(square, torch.tensor([0.5, 0.25]), centre, ground))
    torch.testing.assert_close(measured, centre, atol=0.02, rtol=0)
    torch.testing.assert_close(size, torch.tensor([0.5, 0.25]), atol=0.03, rtol=0)


def test_training_and_test_share_no_concept():
    assert set(LEARNED) | set(TESTED) <= set(CONCEPTS)
    assert not set(LEARNED) & set(TESTED)


@pytest.mark.parametrize("relation", RELATIONS)
def test_exemplars_repeat_and_are_read_back(relation, sprites, tmp_path):
    images, texts = make_exemplars(sprites, relation, 5, seed=3)
    again = make_exemplars(sprites, relation, 5, seed=3)
    assert torch.equal(images, again[0])
    assert texts == again[1]
    assert texts != make_exemplars(sprites, relation, 5, seed=4)[1]
    write_exemplars(tmp_path / "ex", images, texts)
    exemplars = read_exemplars(tmp_path / "ex", "<R>", (64, 64))
    assert exemplars.sentences == [[text] for text in texts]
    torch.testing.assert_close(exemplars.images, images.clamp(0, 1), atol=1 / 255, rtol=0)


def test_exemplars_of_an_unknown_relation(sprites):
    with raises_naming("'inside'"):
        make_exemplars(sprites, "inside", 2)


def test_the_judge_of_edges_distinguishes_left_from_right():
    images, _ = committed_exemplars("edge", "<edge>")
    assert bool(shows_edge(images).all())
    assert not bool(shows_edge(images.flip(3)).any())
    assert not bool(shows_edge(images.roll(20, 3)).all())  # moved to the middle


def test_the_judges_of_above_distinguish_it_from_below_and_from_a_row():
    classifier = load_classifier()
    images, named = committed_exemplars("above", "<above>")
    upper, lower = ([name.strip() for name in names] for names in zip(*named, strict=True))
    assert bool((shows_order(classifier, images, upper, lower) >= shows_above(classifier, images, upper, lower)).all())
    for judge in (shows_above, shows_order):
        assert float(judge(classifier, images, upper, lower).float().mean()) > 0.8
        assert not bool(judge(classifier, images, lower, upper).any())
    assert float(shows_column(images).float().mean()) > 0.8
    assert not bool(shows_column(images.transpose(2, 3)).any())


@pytest.mark.parametrize("relation", RELATIONS)
def test_committed_tokens_lower_the_loss_of_the_shipped_teacher(relation, monkeypatch):
    """On its exemplars the token has a lower denoising loss than the word that it started from."""
    from wadi.zoo import load_teacher

    pipeline = load_teacher()
    assert add_token(pipeline, COMMITTED / f"{relation}.safetensors") == f"<{relation}>"
    ids = pipeline.tokenizer(describe(relation, TESTED[:2], f"<{relation}>")).input_ids
    assert ids.count(pipeline.tokenizer.convert_tokens_to_ids(f"<{relation}>")) == 1
    backbone, exemplars = from_pipeline(pipeline), read_exemplars(COMMITTED / relation, f"<{relation}>", (64, 64))
    start, (learned,) = embeddings_of(pipeline, "on"), read_token(COMMITTED / f"{relation}.safetensors")[1]
    x0 = backbone.encode_images(exemplars.images, batch=16)
    training = TokenTraining(backbone, RelationConfig(), f"<{relation}>", exemplars, x0, start)
    monkeypatch.setattr(loop, "EVALUATED", 32)
    with replaced_embeddings(pipeline, f"<{relation}>", training.state.rows):
        assert training.evaluate([learned[0]]) < training.evaluate(start)
