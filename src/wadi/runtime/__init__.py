"""Generate images with an exported student, without torch: `run.py`, which every ONNX and OpenVINO export has a copy of.

Nothing here imports the rest of the package, torch, diffusers or transformers.
"""

from pathlib import Path

RUNNER = Path(__file__).parent / "run.py"
SETTINGS = "student.json"  # in the folder of an export
