"""Trace a student into three graphs of tensors: text encoders, network and decoder.

The graphs are what `Backbone.encode`, `Backbone.predict` and `Backbone.decode` compute, so a family needs no code for it. Text
is encoded one prompt at a time; network and decoder take up to `MOST_IMAGES` images. The size of the images is fixed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wadi.backbones import Backbone, Condition
from wadi.errors import WadiError, first_line
from wadi.exports.prompt_inputs import HOLDS_ALL, PromptInputs, given_inputs, text_encoders
from wadi.io.quiet import errors_only

MOST_IMAGES = 32  # at once


@dataclass(frozen=True)
class Graph:
    """A traced part of a student.

    Attributes:
        program: the ``ExportedProgram`` of torch.
        inputs, outputs: their names, in order.
        shapes: shape of each input; None = the number of images.
    """

    program: Any
    inputs: list[str]
    outputs: list[str]
    shapes: list[list[int | None]]


class _Text(nn.Module):
    def __init__(self, backbone: Backbone, parts: Sequence[PromptInputs]) -> None:
        super().__init__()
        self.backbone, self.parts, self.encoders = backbone, parts, text_encoders(backbone.pipeline)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        with given_inputs(self.backbone, self.parts, inputs):
            return tuple(self.backbone.encode_with_gradient(["a"]).tensors.values())


class _Network(nn.Module):
    def __init__(self, backbone: Backbone, names: Sequence[str]) -> None:
        super().__init__()
        self.backbone, self.names, self.network = backbone, names, backbone.network

    def forward(self, x_t: Tensor, t: Tensor, *condition: Tensor) -> Tensor:
        return self.backbone.predict(x_t, t, Condition(dict(zip(self.names, condition, strict=True))))


class _Decoder(nn.Module):
    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone, self.vae = backbone, backbone.pipeline.vae

    def forward(self, latents: Tensor) -> Tensor:
        return self.backbone.decode_with_gradient(latents)


@torch.no_grad()
def trace(backbone: Backbone, parts: Sequence[PromptInputs]) -> dict[str, Graph]:
    """Return the graphs ``text``, ``network`` and ``decoder`` of a student on the CPU.

    Raises:
        WadiError: if torch cannot trace one of them.
    """
    vae = backbone.pipeline.vae
    if vae.config.get("force_upcast") and vae.dtype == torch.float16:
        with errors_only():
            vae.to(torch.float32)  # as `wadi.diffusion.autoencoder` does for each call
    for encoder in text_encoders(backbone.pipeline):
        config: Any = encoder.config
        config.use_cache = False  # of a language model: it begins with tensors without dimensions, which converters refuse
    examples = [example for part in parts for example in part.examples]
    with given_inputs(backbone, parts, examples):
        condition = backbone.encode(["a"])
    two = Condition({name: torch.cat([tensor, tensor]) for name, tensor in condition.tensors.items()})
    latents, t = torch.zeros(2, *backbone.latent_shape), torch.full((2,), backbone.student_timesteps[0])
    names = list(condition.tensors)
    return {
        "text": _traced(
            backbone, _Text(backbone, parts), examples, [name for part in parts for name in part.names], names, False
        ),
        "network": _traced(
            backbone, _Network(backbone, names), [latents, t, *two.tensors.values()], ["x_t", "t", *names], ["prediction"], True
        ),
        "decoder": _traced(backbone, _Decoder(backbone), [latents], ["latents"], ["images"], True),
    }


def _traced(
    backbone: Backbone, module: nn.Module, examples: list[Tensor], inputs: list[str], outputs: list[str], batched: bool
) -> Graph:
    batch = {0: torch.export.Dim("batch", min=1, max=MOST_IMAGES)} if batched else None
    # A starred argument counts as one, a tuple.
    named = 2 if isinstance(module, _Network) else len(examples) if batched else 0
    dynamic = [batch] * named + ([(batch,) * (len(examples) - named)] if len(examples) > named else [])
    try:
        with errors_only():
            program = torch.export.export(module.eval(), tuple(examples), dynamic_shapes=tuple(dynamic), strict=False)
    except Exception as error:  # whatever the code of a model does wrong under tracing
        raise WadiError(
            f"torch cannot trace the {type(module).__name__[1:].lower()} of this {type(backbone.pipeline).__name__}: "
            f"{type(error).__name__}: {first_line(error)[:200]}. ONNX and OpenVINO need that. {HOLDS_ALL}"
        ) from error
    _say_what_torch_implies(program)
    shapes = [[None if batched and i == 0 else side for i, side in enumerate(example.shape)] for example in examples]
    return Graph(program, inputs, outputs, shapes)


def _say_what_torch_implies(program: Any) -> None:
    """Write out two things that torch does by itself and ONNX does not.

    A squeeze of a dimension that is not 1 changes nothing, and a concatenation casts its inputs to one dtype.
    """
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        if node.target is torch.ops.aten.squeeze.dim:
            tensor, dim = node.args
            side = tensor.meta["val"].shape[dim]
            if isinstance(side, int) and side != 1:
                node.replace_all_uses_with(tensor)
                graph.erase_node(node)
        elif node.target in (torch.ops.aten.cat.default, torch.ops.aten.concat.default):
            dtype = node.meta["val"].dtype
            for tensor in [tensor for tensor in node.args[0] if tensor.meta["val"].dtype != dtype]:
                with graph.inserting_before(node):
                    cast = graph.call_function(torch.ops.aten._to_copy.default, (tensor,), {"dtype": dtype})
                cast.meta["val"] = tensor.meta["val"].to(dtype)
                node.replace_input_with(tensor, cast)
    program.graph_module.recompile()
