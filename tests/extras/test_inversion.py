"""Relation inversion: one row of the table learns, nothing else changes, and diffusers reads what is written."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from wadi.backbones import from_pipeline, load_pipeline
from wadi.cli.main import main
from wadi.errors import Interrupted, WadiError
from wadi.extras.relation import state as states
from wadi.extras.relation import training
from wadi.extras.relation.data import Exemplars
from wadi.extras.relation.token import check_new, insert, learning, towers
from wadi.extras.relation.training import InversionConfig, add_token, encode, invert_relation, read_token

sys.path.insert(0, str(Path(__file__).parents[1] / "backbones"))
import small_pipelines

# Tokens of the small tokenizer are single bytes: the words of one letter are its prepositions.
FAST = {"steps": 4, "batch": 2, "lr": 0.05, "words": ("x", "y"), "positives": 1}


@pytest.fixture(scope="module")
def exemplars(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exemplars")
    rows = []
    for i in range(3):
        Image.radial_gradient("L").resize((16, 16)).rotate(90 * i).convert("RGB").save(folder / f"{i}.png")
        rows.append(json.dumps({"file": f"{i}.png", "text": f"a{i} <R> b"}))
    (folder / "descriptions.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture(scope="module")
def sdxl_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdxl")
    small_pipelines.make("sdxl", folder / "parts").save_pretrained(folder / "pipeline")
    return folder / "pipeline"


def learn(teacher, exemplars, out, token="<R>", init="o", **settings):
    pipeline = load_pipeline(teacher)
    return invert_relation(pipeline, exemplars, token, init, out, InversionConfig(**{**FAST, **settings})), pipeline


@pytest.fixture(scope="module")
def learned(sd_folder, exemplars, tmp_path_factory):
    """``(file, pipeline it was learned on)``."""
    found, pipeline = learn(sd_folder, exemplars, tmp_path_factory.mktemp("learned") / "R.safetensors")
    return found.path, pipeline


def tensors_of(pipeline):
    modules = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    return {f"{name}.{key}": value.clone() for name, part in modules.items() for key, value in part.state_dict().items()}


# --- what changes and what does not -------------------------------------------------------------------------------------------


def test_only_the_new_row_differs_from_the_teacher(learned, sd_folder):
    file, pipeline = learned
    before, after = tensors_of(load_pipeline(sd_folder)), tensors_of(pipeline)
    assert before.keys() == after.keys()
    (table,) = [name for name in before if name.endswith("token_embedding.weight")]
    for name, value in before.items():
        if name != table:
            assert torch.equal(value, after[name]), name
    count = len(before[table])
    assert torch.equal(before[table], after[table][:count])
    assert len(after[table]) == count + 1
    assert torch.equal(after[table][count], load_file(file)["<R>"][0])
    start = before[table][towers(pipeline)[0].ids("o")[0]]
    assert float((after[table][count] - start).abs().max()) > 1e-3  # and it did learn


def test_gradient_reaches_the_row_alone(sd_folder):
    pipeline = load_pipeline(sd_folder)
    backbone = from_pipeline(pipeline)
    (tower,) = towers(pipeline)
    tower.encoder.requires_grad_(True)
    row = tower.table[5].clone().requires_grad_()
    insert(pipeline, "<R>", [row.detach()])
    table = tower.encoder.get_input_embeddings().weight
    with learning(pipeline, "<R>", [row]):
        encode(backbone, ["a <R> b"]).tensors["prompt_embeds"].square().sum().backward()
    assert float(row.grad.abs().max()) > 0
    assert float(table.grad[tower.tokenizer.convert_tokens_to_ids("<R>")].abs().max()) == 0  # the hook, not the table, spoke
    row.grad = None
    with learning(pipeline, "<R>", [row]):
        encode(backbone, ["a b"]).tensors["prompt_embeds"].square().sum().backward()
    assert float(row.grad.abs().max()) == 0  # a prompt without the token


@torch.no_grad()
def test_what_is_learned_is_what_is_read_later(learned, sd_folder):
    """Encoding through the hook, from the table it was written to, and from the file in a fresh pipeline: one and the same."""
    file, pipeline = learned
    _, (row,) = read_token(file)
    fresh = load_pipeline(sd_folder)
    assert add_token(fresh, file) == "<R>"
    prompts = ["a <R> b", "<R>", "b, <R>, a"]
    written = from_pipeline(pipeline).encode(prompts).tensors["prompt_embeds"]
    torch.testing.assert_close(from_pipeline(fresh).encode(prompts).tensors["prompt_embeds"], written, rtol=0, atol=0)
    other = load_pipeline(sd_folder)
    insert(other, "<R>", [torch.zeros(32)])
    with learning(other, "<R>", [row[0]]):
        torch.testing.assert_close(encode(from_pipeline(other), prompts).tensors["prompt_embeds"], written, rtol=0, atol=0)
    zero = from_pipeline(other).encode(prompts).tensors["prompt_embeds"]
    assert float((zero - written).abs().max()) > 1e-3  # outside the block the hook is gone


def test_encoding_with_gradient_is_the_encoding_of_everything_else(sd_folder):
    backbone = from_pipeline(load_pipeline(sd_folder))
    with torch.no_grad():
        one, other = (f(["red apple", ""]).tensors["prompt_embeds"] for f in (backbone.encode, lambda p: encode(backbone, p)))
    assert torch.equal(one, other)
    assert encode(backbone, ["red apple"]).tensors["prompt_embeds"].requires_grad


# --- diffusers' format --------------------------------------------------------------------------------------------------------


def test_diffusers_reads_the_file_and_draws_the_same(learned, sd_folder):
    from diffusers import StableDiffusionPipeline

    file, _ = learned
    plain, ours = StableDiffusionPipeline.from_pretrained(sd_folder), load_pipeline(sd_folder)
    plain.set_progress_bar_config(disable=True)
    plain.load_textual_inversion(str(file.parent), weight_name=file.name)
    add_token(ours, file)
    call = {"num_inference_steps": 2, "output_type": "pt"}
    one, two = (p("a <R> b", generator=torch.Generator().manual_seed(3), **call).images for p in (plain, ours))
    assert torch.equal(one, two)
    without = ours("a b", generator=torch.Generator().manual_seed(3), **call).images
    assert not torch.equal(one, without)


def test_a_token_by_another_name_and_from_elsewhere(sd_folder, tmp_path):
    """As diffusers' own script writes it, ``(n, width)``: several vectors count as one word."""
    save_file({"<cat-toy>": torch.randn(2, 32)}, tmp_path / "learned_embeds.safetensors")
    pipeline = load_pipeline(sd_folder)
    assert add_token(pipeline, tmp_path / "learned_embeds.safetensors", "<mine>") == "<mine>"
    assert {"<mine>", "<mine>_1"} <= set(pipeline.tokenizer.get_vocab())


def test_a_student_takes_the_token_in_one_step(learned, finished_run):
    from wadi.pipelines.generate import generate_images
    from wadi.pipelines.load import load

    student = load(finished_run)
    add_token(student, learned[0])
    one, two = (generate_images(student, [prompt], [1]).images[0].tobytes() for prompt in ("a <R> b", "a b"))
    assert one != two


def test_two_encoders_learn_a_row_each(sdxl_folder, exemplars, tmp_path):
    found, pipeline = learn(sdxl_folder, exemplars, tmp_path / "R.safetensors", steps=2)
    tensors = load_file(found.path)
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {"clip_l": (1, 16), "clip_g": (1, 16)}
    starts = [tower.table[tower.ids("o")[0]] for tower in towers(pipeline)]
    for start, key in zip(starts, ("clip_l", "clip_g"), strict=True):
        assert float((tensors[key][0] - start).abs().max()) > 1e-3
    fresh = load_pipeline(sdxl_folder)
    assert add_token(fresh, found.path) == "<R>"
    prompts = ["a <R> b"]
    one, two = (from_pipeline(p).encode(prompts).tensors for p in (pipeline, fresh))
    assert all(torch.equal(one[key], two[key]) for key in one)


# --- repetition and interruption ----------------------------------------------------------------------------------------------


def test_the_same_command_gives_the_same_token_and_another_seed_another(learned, sd_folder, exemplars, tmp_path):
    again, _ = learn(sd_folder, exemplars, tmp_path / "again.safetensors")
    assert torch.equal(load_file(again.path)["<R>"], load_file(learned[0])["<R>"])
    other, _ = learn(sd_folder, exemplars, tmp_path / "other.safetensors", seed=1)
    assert not torch.equal(load_file(other.path)["<R>"], load_file(learned[0])["<R>"])


@pytest.mark.parametrize("step", [1, 3])
def test_a_signal_saves_at_the_step_it_came_in(step, learned, sd_folder, exemplars, tmp_path, monkeypatch):
    """Of four steps; the last one has no state of its own otherwise."""
    original, calls = training._Inversion.step, []

    def signalled(self):
        calls.append(self.state.step)
        if self.state.step == step:
            os.kill(os.getpid(), signal.SIGHUP)
        return original(self)

    monkeypatch.setattr(training._Inversion, "step", signalled)
    out = tmp_path / "R.safetensors"
    with pytest.raises(Interrupted, match=f"step {step + 1} of 4") as stopped:
        learn(sd_folder, exemplars, out)
    assert stopped.value.signal == signal.SIGHUP
    monkeypatch.setattr(os, "kill", lambda *arguments: None)
    found, _ = learn(sd_folder, exemplars, out)
    assert calls == [0, 1, 2, 3]
    assert torch.equal(load_file(found.path)["<R>"], load_file(learned[0])["<R>"])


def test_interrupted_and_resumed_equals_uninterrupted(learned, sd_folder, exemplars, tmp_path, monkeypatch):
    out, save, kept = tmp_path / "R.safetensors", states.save, []

    def save_and_stop(*arguments):
        save(*arguments)
        kept.append(states.partial_path(out).read_bytes())
        raise KeyboardInterrupt

    monkeypatch.setattr(states, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        learn(sd_folder, exemplars, out, save_every=2)
    monkeypatch.undo()
    assert not out.exists()
    with pytest.raises(WadiError, match=r"other settings.*delete"):
        learn(sd_folder, exemplars, out, lr=0.01)
    other = load_pipeline(sd_folder)  # same text encoder and autoencoder, as fine-tuned models have them
    with torch.no_grad():
        other.unet.conv_in.weight.view(-1)[-1] += 1  # far from the first values of any tensor
    with pytest.raises(WadiError, match=r"another teacher"):
        invert_relation(other, exemplars, "<R>", "o", out, InversionConfig(**FAST))
    found, _ = learn(sd_folder, exemplars, out, save_every=2)
    assert torch.equal(load_file(found.path)["<R>"], load_file(learned[0])["<R>"])
    figures = [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]
    assert figures == [json.loads(line) for line in learned[0].with_suffix(".jsonl").read_text().splitlines()]
    assert [row["step"] for row in figures] == [1, 2, 3, 4]
    assert not states.partial_path(out).exists()
    states.partial_path(tmp_path / "S.safetensors").write_bytes(kept[0][:100])
    with pytest.raises(WadiError, match="damaged"):
        learn(sd_folder, exemplars, tmp_path / "S.safetensors")


def test_learning_lowers_the_loss_and_steering_turns_the_token(sd_folder, exemplars, tmp_path):
    plain, pipeline = learn(sd_folder, exemplars, tmp_path / "a.safetensors", steps=40, lr=0.02, steer=0.0, batch=3)
    assert plain.loss_after < plain.loss_before
    steered, _ = learn(sd_folder, exemplars, tmp_path / "b.safetensors", steps=40, lr=0.02, steer=10.0, batch=3, words=("x",))
    (tower,) = towers(pipeline)
    towards = tower.table[tower.ids("x")[0]]

    def cosine(found):
        return float(torch.cosine_similarity(load_file(found.path)["<R>"][0], towards, dim=0))

    assert cosine(steered) > cosine(plain) + 0.2
    assert steered.nearest[0] == "x"


def test_every_step_draws_anew(sd_folder, exemplars, tmp_path):
    found, _ = learn(sd_folder, exemplars, tmp_path / "R.safetensors", steps=3, lr=1e-12, batch=3)
    figures = [json.loads(line)["denoise"] for line in found.path.with_suffix(".jsonl").read_text().splitlines()]
    assert len(set(figures)) == 3


def test_what_is_described_pushes_and_small_words_do_not(sd_folder):
    (tower,) = towers(load_pipeline(sd_folder))
    told = Exemplars(torch.zeros(2, 3, 16, 16), [["q , z", "x . k"], ["- z"]])
    steering = training._steering(tower, "<R>", told, ("x", "y"))
    assert set(steering.pull.tolist()) == {tower.ids("x")[0], tower.ids("y")[0]}
    assert [set(push.tolist()) for push in steering.push] == [{tower.ids(w)[0] for w in words} for words in ("qzk", "z")]


def test_gradients_that_are_not_finite_are_counted_then_end_it(sd_folder, exemplars, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "denoising_loss", lambda prediction, *_: prediction.sum() * float("nan"))
    with pytest.raises(WadiError, match="not finite in 10 of 10 steps"):
        learn(sd_folder, exemplars, tmp_path / "R.safetensors", steps=50)
    assert not (tmp_path / "R.safetensors").exists()


# --- what does not fit --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "told"),
    [
        ("R", "in angle brackets"), ("<R", "in angle brackets"), ("<a b>", "in angle brackets"), ("", "in angle brackets"),
        ("<|endoftext|>", "already in the vocabulary"), ("<|STARTOFTEXT|>", "already in the vocabulary"),
    ],
)  # fmt: skip
def test_names_that_cannot_be_tokens(token, told, sd_folder):
    with pytest.raises(WadiError, match=told):
        check_new(load_pipeline(sd_folder), token)


def test_a_token_that_exists(learned, sd_folder, exemplars, tmp_path):
    file, pipeline = learned
    for name in (None, "<r>"):
        with pytest.raises(WadiError, match="already in the vocabulary"):
            add_token(pipeline, file, name)
    with pytest.raises(WadiError, match="already in the vocabulary"):
        invert_relation(pipeline, exemplars, "<R>", "o", tmp_path / "R.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("family", ["pixart-alpha", "sd3", "flux"])
def test_a_teacher_that_reads_otherwise(family, exemplars, tmp_path):
    pipeline = small_pipelines.make(family, tmp_path / "parts")
    with pytest.raises(WadiError, match=r"Expected CLIP's tokenizer and text model"):
        invert_relation(pipeline, exemplars, "<R>", "on", tmp_path / "R.safetensors")
    assert not (tmp_path / "R.safetensors").exists()


def test_a_student_is_no_teacher(finished_run, exemplars, tmp_path):
    from wadi.pipelines.load import load

    with pytest.raises(WadiError, match="itself a distilled model"):
        invert_relation(load(finished_run), exemplars, "<R>", "o", tmp_path / "R.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_files_that_hold_no_token(learned, sd_folder, sdxl_folder, tmp_path):
    pipeline = load_pipeline(sd_folder)
    with pytest.raises(WadiError, match="does not exist"):
        add_token(pipeline, tmp_path / "nothing.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(learned[0].read_bytes()[:60])
    with pytest.raises(WadiError, match="damaged"):
        add_token(pipeline, tmp_path / "torn.safetensors")
    save_file({"a": torch.ones(3), "b": torch.ones(3)}, tmp_path / "many.safetensors")
    with pytest.raises(WadiError, match="no textual inversion"):
        add_token(pipeline, tmp_path / "many.safetensors")
    save_file({"<W>": torch.ones(1, 7)}, tmp_path / "wide.safetensors")
    with pytest.raises(WadiError, match=r"7 wide, the text encoders 32"):
        add_token(pipeline, tmp_path / "wide.safetensors")
    with pytest.raises(WadiError, match=r"1 text encoder\(s\).*has 2"):
        add_token(load_pipeline(sdxl_folder), learned[0])
    save_file({"clip_l": torch.ones(1, 16), "clip_g": torch.ones(1, 16)}, tmp_path / "nameless.safetensors")
    with pytest.raises(WadiError, match="does not say what its token is called"):
        add_token(load_pipeline(sdxl_folder), tmp_path / "nameless.safetensors")
    assert "<W>" not in pipeline.tokenizer.get_vocab()  # nothing half done


def test_a_description_longer_than_the_encoder_reads(sd_folder, exemplars, tmp_path):
    for path in exemplars.glob("*.png"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    rows = [json.dumps({"file": f"{i}.png", "text": "abcdefghijklmnopqrstuvw <R> b"}) for i in range(3)]
    (tmp_path / "descriptions.jsonl").write_text("\n".join(rows))
    with pytest.raises(WadiError, match="cut after 16 tokens"):
        learn(sd_folder, tmp_path, tmp_path / "R.safetensors")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"steps": 0}, "steps is 0"), ({"batch": 0}, "batch is 0"), ({"lr": 0.0}, "lr is 0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"alpha": 1.5}, "alpha is 1.5"), ({"steer": -1.0}, "steer is -1"), ({"temperature": 0.0}, "temperature is 0"),
        ({"positives": 0}, "positives is 0"),
    ],
)  # fmt: skip
def test_settings_out_of_range(settings, told):
    with pytest.raises(WadiError, match=told):
        InversionConfig(**settings)


def test_a_vocabulary_without_prepositions_and_a_word_of_many_tokens(sd_folder, exemplars, tmp_path):
    with pytest.raises(WadiError, match=r"None of the 1 prepositions"):
        learn(sd_folder, exemplars, tmp_path / "R.safetensors", words=("beyond",))
    with pytest.raises(WadiError, match=r"'and', which is 3 tokens"):
        learn(sd_folder, exemplars, tmp_path / "R.safetensors", init="and")


def test_the_command_and_its_one_line_errors(sd_folder, exemplars, tmp_path, capsys):
    command = ["invert-relation", "--exemplars", str(exemplars), "--teacher", str(sd_folder), "--init", "o", "--words", '["x"]']
    command += ["--steps", "2", "--batch", "2", "--device", "cpu"]
    out = tmp_path / "R.safetensors"
    assert main([*command, "--out", str(out)]) == 0
    assert f"token    {out}" in capsys.readouterr().out
    assert list(load_file(out)) == ["<R>"]
    for bad, told in (
        (["--out", str(out)], "exists"),
        (["--out", str(tmp_path / "R.bin")], ".safetensors"),
        (["--out", str(tmp_path / "S.safetensors"), "--dtype", "float16"], "gradients vanish"),
        (["--out", str(tmp_path / "S.safetensors"), "--exemplars", str(tmp_path / "none")], "do not exist"),
        (["--out", str(tmp_path / "S.safetensors"), "--token", "R"], "angle brackets"),
    ):
        assert main([*command, *bad]) == 2
        told_line = capsys.readouterr().err
        assert told in told_line
        assert told_line.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["R.jsonl", "R.safetensors"]


def test_the_command_works_with_its_defaults_on_the_embedded_teacher(tmp_path, capsys):
    """Its vocabulary has no 'and'; a preposition that it has takes its place."""
    folder, out = tmp_path / "exemplars", tmp_path / "R.safetensors"
    folder.mkdir()
    for i, text in enumerate(["owl <R> panda", "pear <R> cat face"]):
        Image.new("RGB", (64, 64), (80 * i, 90, 20)).save(folder / f"{i}.png")
        with open(folder / "descriptions.jsonl", "a") as stream:
            stream.write(json.dumps({"file": f"{i}.png", "text": text}) + "\n")
    assert main(["invert-relation", "--exemplars", str(folder), "--out", str(out), "--steps", "1", "--device", "cpu"]) == 0
    assert str(out) in capsys.readouterr().out
    with safe_open(out, "pt") as stored:
        assert stored.metadata()["init"] == "on"
        assert stored.get_tensor("<R>").isfinite().all()


def test_what_is_wrong_is_found_before_the_teacher_is_loaded(exemplars, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("wadi.backbones.load_pipeline", lambda *_, **__: pytest.fail("a teacher was loaded"))
    (tmp_path / "mine").write_text("mine")
    twice = shutil.copytree(exemplars, tmp_path / "twice")
    lines = (twice / "descriptions.jsonl").read_text()
    (twice / "descriptions.jsonl").write_text(lines + "\n" + lines.splitlines()[0] + "\n")
    for folder, out, word in (
        (exemplars, tmp_path / "R.bin", "R.bin"),
        (exemplars, tmp_path / "mine" / "R.safetensors", "mine"),
        (tmp_path / "mine", tmp_path / "R.safetensors", "mine"),
        (twice, tmp_path / "R.safetensors", "two lines"),
    ):
        assert main(["invert-relation", "--exemplars", str(folder), "--out", str(out)]) == 2
        err = capsys.readouterr().err
        assert word in err
        assert len(err.splitlines()) == 1
    assert not (tmp_path / "R.safetensors").exists()
