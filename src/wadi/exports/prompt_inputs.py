"""How a pipeline turns a prompt into the inputs of its text encoders. No family needs code for it: the pipeline is watched.

`read_prompt_inputs` lets the pipeline encode a prompt and records what each tokenizer received and returned. `given_inputs`
lets it encode again with tensors in place of the tokenizers' results, so that only tensors are traced.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wadi.backbones import Backbone
from wadi.errors import WadiError

HOLDS_ALL = "--to diffusers holds every student, --to lora most of them."
PROBE = " Red Apple "
# Texts whose tokens are compared; the last one is longer than any text encoder reads.
TEXTS = ("", "a red apple", "Zwölf große Bären, 12 € 🍐", "long " * 2000)


@dataclass(frozen=True)
class PromptInputs:
    """The inputs that come from one tokenizer.

    Attributes:
        component: name of the tokenizer in the pipeline.
        file: contents of its ``tokenizer.json``, with padding and truncation as in the pipeline's call.
        prefix: what the pipeline writes before each prompt.
        lower: whether it makes prompts lower-case and removes spaces around them.
        ids, mask: name of the graph's input; None = the text encoder does not read it.
        example_ids, example_mask: ``(1, tokens)``, int64.
    """

    component: str
    file: str
    prefix: str
    lower: bool
    ids: str | None
    mask: str | None
    example_ids: Tensor
    example_mask: Tensor

    @property
    def names(self) -> list[str]:
        """Names of the graph's inputs that come from this tokenizer."""
        return [name for name in (self.ids, self.mask) if name is not None]

    @property
    def examples(self) -> list[Tensor]:
        """A tensor for each of `names`."""
        pairs = ((self.ids, self.example_ids), (self.mask, self.example_mask))
        return [example for name, example in pairs if name is not None]


class _Tokens(dict[str, Tensor]):
    """What a tokenizer returns. Remembers which tensors are read."""

    def __init__(self, ids: Tensor, mask: Tensor, was_read: set[str]) -> None:
        super().__init__(input_ids=ids, attention_mask=mask)
        self.was_read = was_read

    def __getitem__(self, name: str) -> Tensor:
        self.was_read.add(name)
        return super().__getitem__(name)

    def __getattr__(self, name: str) -> Tensor:
        return self[name]


class _StandIn:
    """A tokenizer in a pipeline that records its calls, or returns given tensors."""

    def __init__(self, tokenizer: Any) -> None:
        vars(self).update(tokenizer=tokenizer, calls=[], given=None, was_read=set())

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["tokenizer"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.tokenizer, name, value)

    def __len__(self) -> int:
        return len(self.tokenizer)

    def __call__(self, text: Any, *args: Any, **kwargs: Any) -> Any:
        fixed = kwargs.get("padding") == "max_length"
        if self.given is None:
            output = self.tokenizer(text, *args, **kwargs)
            if not fixed:
                return output
            self.calls.append((text, kwargs, self.tokenizer.backend_tokenizer.to_str()))
            return _Tokens(output["input_ids"], output["attention_mask"], self.was_read)
        ids, mask = self.given
        # The pipelines tokenize a second time without truncation, to warn about long prompts. No tokens, no warning.
        return _Tokens(ids, mask, set()) if fixed else _Tokens(ids[:, :0], mask[:, :0], set())


@contextmanager
def _stand_ins(pipeline: Any) -> Iterator[dict[str, _StandIn]]:
    """Within the block, the tokenizers of a pipeline are stand-ins. Its config does not change."""
    own = {name: part for name, part in pipeline.components.items() if name.startswith("tokenizer") and part is not None}
    stand_ins = {name: _StandIn(tokenizer) for name, tokenizer in own.items()}
    vars(pipeline).update(stand_ins)  # not setattr, which would write their class into the config
    try:
        yield stand_ins
    finally:
        vars(pipeline).update(own)


def read_prompt_inputs(backbone: Backbone) -> list[PromptInputs]:
    """Return how the pipeline tokenizes prompts; tokenizers that it does not use are left out.

    Raises:
        WadiError: if it does so in a way that the runner of an export does not know.
    """
    try:
        with _stand_ins(backbone.pipeline) as stand_ins:
            backbone.encode([PROBE])
    except AttributeError as error:
        if "backend_tokenizer" in str(error):
            raise _unknown(backbone, "a tokenizer that has no tokenizer.json") from error
        raise
    parts = [_inputs(backbone, name, stand_in) for name, stand_in in stand_ins.items() if stand_in.was_read]
    with given_inputs(backbone, parts, [example for part in parts for example in part.examples]):
        given = backbone.encode(["another"]).tensors
    own = backbone.encode([PROBE]).tensors
    if own.keys() != given.keys() or not all(torch.equal(own[name], given[name]) for name in own):
        raise _unknown(backbone, "a chat template, or with as many tokens as the prompt has")
    return parts


def _inputs(backbone: Backbone, component: str, stand_in: _StandIn) -> PromptInputs:
    from tokenizers import Tokenizer

    if len(stand_in.calls) != 1:
        raise _unknown(backbone, f"{component} {len(stand_in.calls)} times for each prompt")
    text, kwargs, file = stand_in.calls[0]
    received = text if isinstance(text, str) else text[0]
    lower = not received.endswith(PROBE)
    end = PROBE.lower().strip() if lower else PROBE
    if not received.endswith(end):
        raise _unknown(backbone, f"the text {received[-80:]!r} in place of {PROBE!r}")
    alone = Tokenizer.from_str(file)
    for example in TEXTS:
        expected = stand_in.tokenizer([example], **kwargs)
        encoding = alone.encode(example)
        if [encoding.ids, encoding.attention_mask] != [expected[key][0].tolist() for key in ("input_ids", "attention_mask")]:
            raise _unknown(backbone, f"{component}, whose tokenizer.json gives other tokens for {example[:40]!r}")
    expected = stand_in.tokenizer([received], **kwargs)
    suffix = component.removeprefix("tokenizer")
    ids, mask = (f"{key}{suffix}" if key in stand_in.was_read else None for key in ("input_ids", "attention_mask"))
    prefix, examples = received[: -len(end)], (expected["input_ids"], expected["attention_mask"])
    return PromptInputs(component, file, prefix, lower, ids, mask, *examples)


def _unknown(backbone: Backbone, what: str) -> WadiError:
    return WadiError(
        f"{type(backbone.pipeline).__name__} encodes prompts with {what}, which the runner of an ONNX or OpenVINO export "
        f"cannot do. {HOLDS_ALL}"
    )


@contextmanager
def given_inputs(backbone: Backbone, parts: Sequence[PromptInputs], tensors: Sequence[Tensor]) -> Iterator[None]:
    """Within the block, the tokenizers return ``tensors``, one for each of the `PromptInputs.names` of ``parts``."""
    rest = list(tensors)
    with _stand_ins(backbone.pipeline) as stand_ins:
        for part in parts:
            ids, mask = (rest.pop(0) if name else None for name in (part.ids, part.mask))
            given = (part.example_ids if ids is None else ids, part.example_mask if mask is None else mask)
            vars(stand_ins[part.component])["given"] = given
        yield


def text_encoders(pipeline: Any) -> torch.nn.ModuleList:
    """Return the text encoders of a pipeline."""
    return torch.nn.ModuleList(
        part for name, part in pipeline.components.items() if name.startswith("text_encoder") and part is not None
    )
