"""Prompts are read unchanged, and their order depends only on seed and position."""

import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raising import raises_naming
from wadi.errors import WadiError
from wadi.prompts.order import PromptOrder
from wadi.prompts.reading import Prompts, open_prompts, read_prompts
from wadi.zoo import training_prompts


def test_lines_are_stripped_and_empty_ones_left_out(tmp_path):
    path = tmp_path / "p.txt"
    path.write_bytes("\ufeffred apple\r\n\n   \n  a cat, «ink»  \nred apple".encode())
    assert read_prompts(path) == ["red apple", "a cat, «ink»", "red apple"]


@pytest.mark.parametrize(
    ("content", "named"),
    [(b"", "p.txt"), (b"\n \n\t\n", "p.txt"), (b"\x89PNG\r\n\x1a\n\xff\xfe", "UTF-8"), (b"apple\0pear", "line 1")],
)
def test_bad_files(content, named, tmp_path):
    path = tmp_path / "p.txt"
    path.write_bytes(content)
    with raises_naming("p.txt", named):
        read_prompts(path)


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "none.txt", tmp_path):
        with raises_naming(repr(str(path))):
            read_prompts(path)


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 12), batch=st.integers(1, 9), epochs=st.integers(1, 4), seed=st.integers(0, 2**32 - 1))
def test_every_prompt_once_an_epoch_whatever_the_batch(count, batch, epochs, seed):
    order = PromptOrder(count, seed)
    drawn = []
    while len(drawn) < count * epochs:
        drawn += order.rows(len(drawn), batch).tolist()
    for epoch in range(epochs):
        assert sorted(drawn[epoch * count : (epoch + 1) * count]) == list(range(count))
    assert PromptOrder(count, seed).rows(0, len(drawn)).tolist() == drawn  # the batch does not enter


@settings(max_examples=30, deadline=None)
@given(position=st.integers(0, 40), seed=st.integers(0, 99))
def test_position_is_all_there_is_to_resume(position, seed):
    straight = PromptOrder(7, seed)
    for start in range(position):
        straight.rows(start, 1)
    assert torch.equal(straight.rows(position, 5), PromptOrder(7, seed).rows(position, 5))


def test_seeds_and_epochs_do_not_collide(monkeypatch):
    """No two of many (seed, epoch) shuffle alike: the seeds of torch's generators are all different."""
    used, plain = [], torch.Generator.manual_seed

    class Noting(torch.Generator):
        def manual_seed(self, seed):
            used.append(seed)
            return plain(self, seed)

    monkeypatch.setattr(torch, "Generator", Noting)
    pairs = [(seed, epoch) for seed in (*range(12), 2**31, 2**32 - 1) for epoch in (*range(12), 999, 100_000)]
    for seed, epoch in pairs:
        PromptOrder(3, seed).rows(3 * epoch, 1)
    assert len(set(used)) == len(pairs)
    assert all(0 <= seed < 2**63 for seed in used)


def test_the_digest_knows_where_prompts_end_and_their_order():
    digests = {Prompts(iter(texts)).digest for texts in (["ab", "c"], ["a", "bc"], ["abc"], ["c", "ab"], ["ab", "c", "c"])}
    assert len(digests) == 5
    assert (
        Prompts(iter(["ab", "c"])).digest == hashlib.sha256(b"\2" + bytes(7) + b"ab" + b"\1" + bytes(7) + b"c").hexdigest()[:16]
    )


def test_prompts_keep_their_order(tmp_path):
    words = [f"word {i}" for i in (3, 1, 2, 10, 0)]
    (tmp_path / "p.txt").write_text("\n".join(words))
    prompts = open_prompts(tmp_path / "p.txt")
    assert list(prompts) == words
    assert prompts[1:3] == words[1:3]
    assert (prompts[-1], prompts[0]) == ("word 0", "word 3")


def test_epochs_and_seeds_shuffle_differently():
    first, second = (PromptOrder(50, 0).rows(start, 50).tolist() for start in (0, 50))
    other = PromptOrder(50, 1).rows(0, 50).tolist()
    assert first != second
    assert first != other
    assert first != list(range(50))


def test_zoo_gives_its_training_captions_and_their_digest_never_changes():
    """The digest is in run folders, checkpoints and embedding caches: another one would end the runs that they belong to."""
    prompts = open_prompts("zoo")
    assert list(prompts) == training_prompts()
    assert (len(prompts), prompts.digest) == (4664, "37c0a58ccc63224d")


def test_zoo_has_no_fields():
    with pytest.raises(WadiError) as caught:
        open_prompts("zoo", field="caption")
    assert "'caption'" in str(caught.value)
    assert "zoo" in str(caught.value)


def test_zoo_is_never_a_file_or_folder_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zoo").write_text("something else")
    assert len(open_prompts("zoo")) == 4664
