"""Learning a relation token: one row of the embedding table changes, nothing else, and diffusers reads the file."""

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

from raising import raises_naming
from wadi.backbones import from_pipeline, load_pipeline
from wadi.cli.main import main
from wadi.errors import Interrupted, WadiError
from wadi.extras.relation import loop
from wadi.extras.relation.config import RelationConfig
from wadi.extras.relation.exemplars import Exemplars
from wadi.extras.relation.loop import TokenTraining, steering_tokens
from wadi.extras.relation.state import partial_path
from wadi.extras.relation.token_file import add_token, read_token
from wadi.extras.relation.training import learn_token
from wadi.extras.relation.vocabulary import check_new_token, insert_token, replaced_embeddings, text_encoders

sys.path.insert(0, str(Path(__file__).parents[1] / "backbones"))
import small_pipelines

# The tokens of the small tokenizer are single letters, so single letters are its prepositions.
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
    return learn_token(pipeline, exemplars, token, init, out, RelationConfig(**{**FAST, **settings})), pipeline


@pytest.fixture(scope="module")
def learned(sd_folder, exemplars, tmp_path_factory):
    """Return ``(token file, pipeline it was learned on)``."""
    result, pipeline = learn(sd_folder, exemplars, tmp_path_factory.mktemp("learned") / "R.safetensors")
    return result.path, pipeline


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
    start = before[table][text_encoders(pipeline)[0].ids_of("o")[0]]
    assert float((after[table][count] - start).abs().max()) > 1e-3  # the row has changed


def test_only_the_row_receives_a_gradient(sd_folder):
    pipeline = load_pipeline(sd_folder)
    backbone = from_pipeline(pipeline)
    (encoder,) = text_encoders(pipeline)
    encoder.model.requires_grad_(True)
    row = encoder.table[5].clone().requires_grad_()
    insert_token(pipeline, "<R>", [row.detach()])
    table = encoder.model.get_input_embeddings().weight
    with replaced_embeddings(pipeline, "<R>", [row]):
        backbone.encode_with_gradient(["a <R> b"]).tensors["prompt_embeds"].square().sum().backward()
    assert float(row.grad.abs().max()) > 0
    assert float(table.grad[encoder.id_of("<R>")].abs().max()) == 0  # the hook replaces the table's row
    row.grad = None
    with replaced_embeddings(pipeline, "<R>", [row]):
        backbone.encode_with_gradient(["a b"]).tensors["prompt_embeds"].square().sum().backward()
    assert float(row.grad.abs().max()) == 0  # a prompt without the token


@torch.no_grad()
def test_the_token_encodes_the_same_while_it_is_learned_and_later(learned, sd_folder):
    """Through the hook, from the table, and from the file in a fresh pipeline the encoding is the same."""
    file, pipeline = learned
    _, (row,) = read_token(file)
    fresh = load_pipeline(sd_folder)
    assert add_token(fresh, file) == "<R>"
    prompts = ["a <R> b", "<R>", "b, <R>, a"]
    written = from_pipeline(pipeline).encode(prompts).tensors["prompt_embeds"]
    torch.testing.assert_close(from_pipeline(fresh).encode(prompts).tensors["prompt_embeds"], written, rtol=0, atol=0)
    other = load_pipeline(sd_folder)
    insert_token(other, "<R>", [torch.zeros(32)])
    with replaced_embeddings(other, "<R>", [row[0]]):
        torch.testing.assert_close(
            from_pipeline(other).encode_with_gradient(prompts).tensors["prompt_embeds"], written, rtol=0, atol=0
        )
    zero = from_pipeline(other).encode(prompts).tensors["prompt_embeds"]
    assert float((zero - written).abs().max()) > 1e-3  # outside the block the hook is gone


def test_encoding_with_gradients_gives_the_same_values(sd_folder):
    backbone = from_pipeline(load_pipeline(sd_folder))
    with torch.no_grad():
        one = backbone.encode(["red apple", ""]).tensors["prompt_embeds"]
        other = backbone.encode_with_gradient(["red apple", ""]).tensors["prompt_embeds"]
    assert torch.equal(one, other)
    assert backbone.encode_with_gradient(["red apple"]).tensors["prompt_embeds"].requires_grad


# --- diffusers' format --------------------------------------------------------------------------------------------------------


def test_diffusers_reads_the_file_and_generates_the_same_image(learned, sd_folder):
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


def test_a_token_of_several_vectors_under_another_name(sd_folder, tmp_path):
    """diffusers' own script writes ``(n, width)``; the vectors become tokens of their own."""
    save_file({"<cat-toy>": torch.randn(2, 32)}, tmp_path / "learned_embeds.safetensors")
    pipeline = load_pipeline(sd_folder)
    assert add_token(pipeline, tmp_path / "learned_embeds.safetensors", "<mine>") == "<mine>"
    assert {"<mine>", "<mine>_1"} <= set(pipeline.tokenizer.get_vocab())


def test_a_student_generates_with_the_token_in_one_step(learned, finished_run):
    from wadi.pipelines.generate import generate_images
    from wadi.pipelines.load import load

    student = load(finished_run)
    add_token(student, learned[0])
    one, two = (generate_images(student, [prompt], [1]).images[0].tobytes() for prompt in ("a <R> b", "a b"))
    assert one != two


def test_two_encoders_learn_a_row_each(sdxl_folder, exemplars, tmp_path):
    result, pipeline = learn(sdxl_folder, exemplars, tmp_path / "R.safetensors", steps=2)
    tensors = load_file(result.path)
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {"clip_l": (1, 16), "clip_g": (1, 16)}
    starts = [encoder.table[encoder.ids_of("o")[0]] for encoder in text_encoders(pipeline)]
    for start, key in zip(starts, ("clip_l", "clip_g"), strict=True):
        assert float((tensors[key][0] - start).abs().max()) > 1e-3
    fresh = load_pipeline(sdxl_folder)
    assert add_token(fresh, result.path) == "<R>"
    prompts = ["a <R> b"]
    one, two = (from_pipeline(p).encode(prompts).tensors for p in (pipeline, fresh))
    assert all(torch.equal(one[key], two[key]) for key in one)


# --- repetition and interruption ----------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_token_and_another_seed_another(learned, sd_folder, exemplars, tmp_path):
    again, _ = learn(sd_folder, exemplars, tmp_path / "again.safetensors")
    assert torch.equal(load_file(again.path)["<R>"], load_file(learned[0])["<R>"])
    other, _ = learn(sd_folder, exemplars, tmp_path / "other.safetensors", seed=1)
    assert not torch.equal(load_file(other.path)["<R>"], load_file(learned[0])["<R>"])


@pytest.mark.parametrize("step", [1, 3])
def test_a_signal_saves_at_the_step_it_came_in(step, learned, sd_folder, exemplars, tmp_path, monkeypatch):
    """Of four steps. After the last one no state would be saved without the signal."""
    original, calls = TokenTraining.step, []

    def signalled(self):
        calls.append(self.state.step)
        if self.state.step == step:
            os.kill(os.getpid(), signal.SIGHUP)
        return original(self)

    monkeypatch.setattr(TokenTraining, "step", signalled)
    out = tmp_path / "R.safetensors"
    with pytest.raises(Interrupted, match=f"step {step + 1} of 4") as stopped:
        learn(sd_folder, exemplars, out)
    assert stopped.value.signal == signal.SIGHUP
    monkeypatch.setattr(os, "kill", lambda *arguments: None)
    result, _ = learn(sd_folder, exemplars, out)
    assert calls == [0, 1, 2, 3]
    assert torch.equal(load_file(result.path)["<R>"], load_file(learned[0])["<R>"])


def test_interrupted_and_resumed_equals_uninterrupted(learned, sd_folder, exemplars, tmp_path, monkeypatch):
    out, save, saved = tmp_path / "R.safetensors", loop.save_state, []

    def save_and_stop(*arguments):
        save(*arguments)
        saved.append(partial_path(out).read_bytes())
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "save_state", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        learn(sd_folder, exemplars, out, save_every=2)
    monkeypatch.undo()
    assert not out.exists()
    with raises_naming(partial_path(out).name):
        learn(sd_folder, exemplars, out, lr=0.01)
    other = load_pipeline(sd_folder)  # same text encoder and autoencoder, as fine-tuned models have them
    with torch.no_grad():
        other.unet.conv_in.weight.view(-1)[-1] += 1  # far from the first values of any tensor
    with raises_naming(partial_path(out).name):
        learn_token(other, exemplars, "<R>", "o", out, RelationConfig(**FAST))
    assert partial_path(out).read_bytes() == saved[0]
    result, _ = learn(sd_folder, exemplars, out, save_every=2)
    assert torch.equal(load_file(result.path)["<R>"], load_file(learned[0])["<R>"])
    rows = [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]
    assert rows == [json.loads(line) for line in learned[0].with_suffix(".jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert not partial_path(out).exists()
    partial_path(tmp_path / "S.safetensors").write_bytes(saved[0][:100])
    with raises_naming("S.partial.safetensors"):
        learn(sd_folder, exemplars, tmp_path / "S.safetensors")


def test_learning_lowers_the_loss_and_steering_turns_the_token(sd_folder, exemplars, tmp_path):
    plain, pipeline = learn(sd_folder, exemplars, tmp_path / "a.safetensors", steps=40, lr=0.02, steer=0.0, batch=3)
    assert plain.loss_after < plain.loss_before
    steered, _ = learn(sd_folder, exemplars, tmp_path / "b.safetensors", steps=40, lr=0.02, steer=10.0, batch=3, words=("x",))
    (encoder,) = text_encoders(pipeline)
    preposition = encoder.table[encoder.ids_of("x")[0]]

    def cosine(result):
        return float(torch.cosine_similarity(load_file(result.path)["<R>"][0], preposition, dim=0))

    assert cosine(steered) > cosine(plain) + 0.2
    assert steered.nearest[0] == "x"


def test_every_step_has_other_noise(sd_folder, exemplars, tmp_path):
    result, _ = learn(sd_folder, exemplars, tmp_path / "R.safetensors", steps=3, lr=1e-12, batch=3)
    losses = [json.loads(line)["denoise"] for line in result.path.with_suffix(".jsonl").read_text().splitlines()]
    assert len(set(losses)) == 3


def test_described_things_push_and_function_words_do_not(sd_folder):
    (encoder,) = text_encoders(load_pipeline(sd_folder))
    exemplars = Exemplars(torch.zeros(2, 3, 16, 16), [["q , z", "x . k"], ["- z"]])
    steering = steering_tokens(encoder, "<R>", exemplars, ("x", "y"))
    assert set(steering.pull.tolist()) == {encoder.ids_of("x")[0], encoder.ids_of("y")[0]}
    assert [set(push.tolist()) for push in steering.push] == [{encoder.ids_of(w)[0] for w in words} for words in ("qzk", "z")]


def test_too_many_gradients_that_are_not_finite_end_the_training(sd_folder, exemplars, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "denoising_loss", lambda prediction, *_: prediction.sum() * float("nan"))
    with raises_naming("10 of 10"):
        learn(sd_folder, exemplars, tmp_path / "R.safetensors", steps=50)
    assert not (tmp_path / "R.safetensors").exists()


# --- bad input --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", ["R", "<R", "<a b>", "", "<|endoftext|>", "<|STARTOFTEXT|>"])
def test_names_that_cannot_be_tokens(token, sd_folder):
    with raises_naming(repr(token)):
        check_new_token(load_pipeline(sd_folder), token)


def test_a_token_that_exists_is_not_learned_or_added_again(learned, sd_folder, exemplars, tmp_path):
    file, pipeline = learned
    size = len(text_encoders(pipeline)[0].table)
    for name in ("<R>", "<r>"):
        with raises_naming(repr(name)):
            add_token(pipeline, file, name)
    assert len(text_encoders(pipeline)[0].table) == size
    with raises_naming("'<R>'"):
        learn_token(pipeline, exemplars, "<R>", "o", tmp_path / "R.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("family", ["pixart-alpha", "sd3", "flux"])
def test_a_teacher_with_another_text_encoder_than_clip(family, exemplars, tmp_path):
    pipeline = small_pipelines.make(family, tmp_path / "parts")
    with raises_naming("T5"):
        learn_token(pipeline, exemplars, "<R>", "on", tmp_path / "R.safetensors")
    assert not (tmp_path / "R.safetensors").exists()


def test_a_student_cannot_be_the_teacher(finished_run, exemplars, tmp_path):
    from wadi.pipelines.load import load

    with pytest.raises(WadiError):
        learn_token(load(finished_run), exemplars, "<R>", "o", tmp_path / "R.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_files_without_a_fitting_token(learned, sd_folder, sdxl_folder, tmp_path):
    pipeline = load_pipeline(sd_folder)
    with raises_naming("nothing.safetensors"):
        add_token(pipeline, tmp_path / "nothing.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(learned[0].read_bytes()[:60])
    with raises_naming("torn.safetensors"):
        add_token(pipeline, tmp_path / "torn.safetensors")
    save_file({"a": torch.ones(3), "b": torch.ones(3)}, tmp_path / "many.safetensors")
    with raises_naming("many.safetensors", "a, b"):
        add_token(pipeline, tmp_path / "many.safetensors")
    save_file({"<W>": torch.ones(1, 7)}, tmp_path / "wide.safetensors")
    with raises_naming(7, 32):
        add_token(pipeline, tmp_path / "wide.safetensors")
    with raises_naming(1, 2, learned[0]):
        add_token(load_pipeline(sdxl_folder), learned[0])
    save_file({"clip_l": torch.ones(1, 16), "clip_g": torch.ones(1, 16)}, tmp_path / "nameless.safetensors")
    with raises_naming("nameless.safetensors"):
        add_token(load_pipeline(sdxl_folder), tmp_path / "nameless.safetensors")
    assert "<W>" not in pipeline.tokenizer.get_vocab()  # it was not added


def test_a_description_that_is_too_long_for_the_text_encoder(sd_folder, exemplars, tmp_path):
    for path in exemplars.glob("*.png"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    rows = [json.dumps({"file": f"{i}.png", "text": "abcdefghijklmnopqrstuvw <R> b"}) for i in range(3)]
    (tmp_path / "descriptions.jsonl").write_text("\n".join(rows))
    with raises_naming("<R>", 16):
        learn(sd_folder, tmp_path, tmp_path / "R.safetensors")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0), ("batch", 0), ("lr", 0.0), ("lr", float("nan")), ("alpha", 1.5), ("steer", -1.0), ("temperature", 0.0),
        ("positives", 0),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_named(name, value):
    with raises_naming(name, f"{value:g}"):
        RelationConfig(**{name: value})


def test_words_that_are_not_one_token(sd_folder, exemplars, tmp_path):
    with raises_naming("beyond"):
        learn(sd_folder, exemplars, tmp_path / "R.safetensors", words=("beyond",))
    with raises_naming("'and'", 3):
        learn(sd_folder, exemplars, tmp_path / "R.safetensors", init="and")


def test_the_command_and_its_errors_of_one_line(sd_folder, exemplars, tmp_path, capsys):
    command = ["invert-relation", "--exemplars", str(exemplars), "--teacher", str(sd_folder), "--init", "o", "--words", '["x"]']
    command += ["--steps", "2", "--batch", "2", "--device", "cpu"]
    out = tmp_path / "R.safetensors"
    assert main([*command, "--out", str(out)]) == 0
    assert f"token    {out}" in capsys.readouterr().out
    assert list(load_file(out)) == ["<R>"]
    for bad, named in (
        (["--out", str(out)], str(out)),
        (["--out", str(tmp_path / "R.bin")], str(tmp_path / "R.bin")),
        (["--out", str(tmp_path / "S.safetensors"), "--dtype", "float16"], "float16"),
        (["--out", str(tmp_path / "S.safetensors"), "--exemplars", str(tmp_path / "none")], str(tmp_path / "none")),
        (["--out", str(tmp_path / "S.safetensors"), "--token", "R"], "'R'"),
    ):
        assert main([*command, *bad]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert named in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["R.jsonl", "R.safetensors"]


def test_the_command_works_with_its_defaults_on_the_embedded_teacher(tmp_path, capsys):
    """Its vocabulary has no 'and', so the token starts from a preposition."""
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


def test_mistakes_are_found_before_the_teacher_is_loaded(exemplars, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("wadi.backbones.load_pipeline", lambda *_, **__: pytest.fail("a teacher was loaded"))
    (tmp_path / "mine").write_text("mine")
    twice = shutil.copytree(exemplars, tmp_path / "twice")
    lines = (twice / "descriptions.jsonl").read_text()
    (twice / "descriptions.jsonl").write_text(lines + "\n" + lines.splitlines()[0] + "\n")
    for folder, out, word in (
        (exemplars, tmp_path / "R.bin", "R.bin"),
        (exemplars, tmp_path / "mine" / "R.safetensors", "mine"),
        (tmp_path / "mine", tmp_path / "R.safetensors", "mine"),
        (twice, tmp_path / "R.safetensors", "0.png"),
    ):
        assert main(["invert-relation", "--exemplars", str(folder), "--out", str(out)]) == 2
        err = capsys.readouterr().err
        assert word in err
        assert len(err.splitlines()) == 1
    assert not (tmp_path / "R.safetensors").exists()
