"""OpenVINO IR files of a student."""

from __future__ import annotations

import io
import logging
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch

from wadi.exports import runtime_folder
from wadi.exports.graphs import Graph
from wadi.exports.runtime_folder import Precision, Runtime
from wadi.exports.source import Source
from wadi.exports.written import Written
from wadi.io.installation import require


def write(source: Source, folder: Path, settings: Any) -> Written:
    """Write the OpenVINO files into ``folder``.

    Raises:
        WadiError: if the packages are missing, or see `wadi.exports.runtime_folder.write`.
    """
    packages = ("openvino", "nncf") if settings.precision == "int8" else ("openvino",)
    require("openvino", "Writing and checking OpenVINO files", *packages)
    return runtime_folder.write(source, folder, settings.precision, OPENVINO)


def write_graph(graph: Graph, path: Path, precision: Precision) -> None:
    """Write a graph as an IR file, and its weights into another one next to it."""
    import openvino

    model = openvino.convert_model(graph.program)
    for port, name in zip(model.inputs, graph.inputs, strict=True):
        port.get_tensor().set_names({name})
        port.get_node().set_friendly_name(name)
    for port, name in zip(model.outputs, graph.outputs, strict=True):
        port.get_tensor().set_names({name})
    model.reshape(
        {name: [-1 if side is None else side for side in shape] for name, shape in zip(graph.inputs, graph.shapes, strict=True)}
    )
    if precision == "int8":
        model = _with_int8_weights(model)
    openvino.save_model(model, str(path), compress_to_fp16=precision == "float16")


def _with_int8_weights(model: Any) -> Any:
    import nncf

    nncf.set_log_level(logging.ERROR)
    with redirect_stdout(io.StringIO()):  # a progress bar
        return nncf.compress_weights(model)


OPENVINO = Runtime(
    name="openvino",
    title="OpenVINO",
    package="openvino",
    suffix=".xml",
    traced_dtypes=dict.fromkeys(("float32", "float16", "int8"), torch.float32),  # it computes in float32, or as the device does
    write_graph=write_graph,
)
