"""Folders for the runner of ONNX and OpenVINO exports: one without graphs, and one with graphs that are a formula."""

import json
import shutil

from wadi.runtime import RUNNER, SETTINGS

TOKENS = 4
NETWORK = """
<ir_version: 8, opset_import: ["" : 18]>
network (float[B, 3, 2, 2] x_t, int64[B] t, float[B, N] words) => (float[B, 3, 2, 2] prediction) {
    share = Constant <value = float {0.25}> ()
    thousand = Constant <value = float {1000.0}> ()
    sides = Constant <value = int64[3] {1, 2, 3}> ()
    axes = Constant <value = int64[1] {1}> ()
    scaled = Mul (x_t, share)
    time = Cast <to = 1> (t)
    part = Div (time, thousand)
    sum = ReduceMean <keepdims = 0> (words, axes)
    one = Add (part, sum)
    wide = Unsqueeze (one, sides)
    prediction = Add (scaled, wide)
}
"""
TEXT = """
<ir_version: 8, opset_import: ["" : 18]>
text (int64[1, N] input_ids) => (float[1, N] words) {
    numbers = Cast <to = 1> (input_ids)
    thousand = Constant <value = float {1000.0}> ()
    words = Div (numbers, thousand)
}
"""
DECODER = """
<ir_version: 8, opset_import: ["" : 18]>
decoder (float[B, 3, 2, 2] latents) => (float[B, 3, 2, 2] images) {
    low = Constant <value = float {0.0}> ()
    high = Constant <value = float {1.0}> ()
    images = Clip (latents, low, high)
}
"""


def write_settings(folder, parts, **settings):
    """Write ``student.json`` and the tokenizers of ``parts`` (`PromptInputs`), without graphs unless ``settings`` has them."""
    tokenizers = []
    for part in parts:
        (folder / f"{part.component}.json").write_text(part.file, encoding="utf-8")
        tokenizers.append(
            {"file": f"{part.component}.json", "prefix": part.prefix, "lower": part.lower, "ids": part.ids, "mask": part.mask}
        )
    values = {"format": "onnx", "tokenizers": tokenizers, "graphs": {}, **settings}
    (folder / SETTINGS).write_text(json.dumps(values))
    shutil.copyfile(RUNNER, folder / RUNNER.name)


def write_formula(folder, **settings):
    """Write an ONNX export of 2 x 2 images. Its network returns ``x_t / 4 + t / 1000 + mean(token numbers) / 1000``."""
    import onnx.parser
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    folder.mkdir()
    for name, text in (("text", TEXT), ("network", NETWORK), ("decoder", DECODER)):
        model = onnx.parser.parse_model(text)
        onnx.checker.check_model(model)
        onnx.save(model, folder / f"{name}.onnx")
    words = Tokenizer(WordLevel({"<pad>": 0, "<unk>": 1, "red": 100, "apple": 200}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    words.enable_padding(length=TOKENS, pad_id=0, pad_token="<pad>")
    words.enable_truncation(TOKENS)
    words.save(str(folder / "tokenizer.json"))
    graphs = {"text": (["input_ids"], ["words"]), "network": (["x_t", "t", "words"], ["prediction"]),
              "decoder": (["latents"], ["images"])}  # fmt: skip
    values = {
        "format": "onnx", "precision": "float32", "resolution": [2, 2], "latent_shape": [3, 2, 2], "most_images": 8,
        "prediction": "velocity", "timesteps": [800], "alphas": [0.2], "sigmas": [0.8], "rounds_latents": False,
        "tokenizers": [{"file": "tokenizer.json", "prefix": "", "lower": True, "ids": "input_ids", "mask": None}],
        "graphs": {
            name: {"file": f"{name}.onnx", "inputs": inputs, "outputs": outputs} for name, (inputs, outputs) in graphs.items()
        },
        **settings,
    }  # fmt: skip
    (folder / SETTINGS).write_text(json.dumps(values))
    shutil.copyfile(RUNNER, folder / RUNNER.name)
    return folder
