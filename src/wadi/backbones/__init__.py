"""Model families behind one contract, one file each.

Start with `base.py`: `Backbone` is the contract. `registry.py` names the file of each family, and finds the backbone of a
pipeline; `packed.py` is shared by flows whose pipelines pack latents. `loading.py` loads a pipeline from a folder or the
Hub, and `family_files.py` runs the file of a family that the user names.
"""

from wadi.backbones.base import Backbone
from wadi.backbones.condition import Condition
from wadi.backbones.family_files import name_family
from wadi.backbones.loading import load_pipeline
from wadi.backbones.registry import family, from_pipeline, register_family
from wadi.diffusion.schedulers import check_not_distilled

__all__ = [
    "Backbone", "Condition", "check_not_distilled", "family", "from_pipeline", "load_pipeline", "name_family",
    "register_family",
]  # fmt: skip
