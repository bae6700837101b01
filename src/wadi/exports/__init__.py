"""Write a student in the form that another program reads, and check it with that program's own reader.

`source.py` says which student and with which prompts. Each format has a file with one function that writes a folder and returns
how to read it back. `write.py` puts them together: start there. `card.py` writes the README of an export.
"""

# Format -> "module:function" that writes it. Imported on use.
FORMATS = {
    "diffusers": "wadi.exports.diffusers_folder:write",
    "adapter": "wadi.exports.adapter_folder:write",
    "lora": "wadi.exports.lora:write",
    "single-file": "wadi.exports.single_file:write",
    "onnx": "wadi.exports.onnx_folder:write",
    "openvino": "wadi.exports.openvino_folder:write",
}
