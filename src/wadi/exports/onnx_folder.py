"""ONNX files of a student, for ONNX Runtime."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
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
    """Write the ONNX files into ``folder``.

    Raises:
        WadiError: if the packages are missing, or see `wadi.exports.runtime_folder.write`.
    """
    require("onnx", "Writing and checking ONNX files", "onnx", "onnxscript", "onnxruntime")
    return runtime_folder.write(source, folder, settings.precision, ONNX)


def write_graph(graph: Graph, path: Path, precision: Precision) -> None:
    """Write a graph as an ONNX file, and its weights into another one next to it."""
    with _quiet("torch.onnx"):
        # The optimiser drops the 1e-15 of Sana's linear attention, which then divides by zero. ONNX Runtime optimises too.
        program = torch.onnx.export(
            graph.program, input_names=graph.inputs, output_names=graph.outputs, dynamo=True, optimize=False, verbose=False
        )
    assert program is not None
    model = program.model
    _remove_traces(model)
    if precision != "int8":
        program.save(str(path), external_data=True)
        return
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory(dir=path.parent) as folder, _quiet(""):
        exact, prepared = f"{folder}/exact.onnx", f"{folder}/prepared.onnx"
        program.save(exact, external_data=True)
        onnxruntime.set_default_logger_severity(3)  # errors
        quant_pre_process(exact, prepared, skip_symbolic_shape=True, save_as_external_data=True)  # transposed weights too
        quantize_dynamic(prepared, path, per_channel=True, weight_type=QuantType.QInt8, use_external_data_format=True)
        onnxruntime.set_default_logger_severity(2)  # warnings, the default


def _remove_traces(model: Any) -> None:
    """Remove what torch notes at each node: the lines of Python that made it, with the paths of their files."""
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        for node in graph.all_nodes():
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
        graph.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.metadata_props.clear()


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Turn off the warnings of a logger, such as those about operators of packages that are not installed."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


ONNX = Runtime(
    name="onnx",
    title="ONNX",
    package="onnxruntime",
    suffix=".onnx",
    traced_dtypes={"float32": torch.float32, "float16": torch.float16, "int8": torch.float32},
    write_graph=write_graph,
)
