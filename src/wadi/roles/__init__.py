"""Roles: adapters of any PEFT method on one frozen network.

The teacher is the network without adapters; the student and the fake model are one adapter each. `layers.py` attaches adapters
and switches between them: start there. `files.py` saves and loads adapter folders, and `checkpointing.py` recomputes
activations in the role that computed them. `combined.py` merges several adapters.
"""

from wadi.roles.checkpointing import enable_checkpointing
from wadi.roles.combined import fuse_folders
from wadi.roles.files import (
    CONFIG,
    FILES,
    WEIGHTS,
    About,
    check_lorad,
    is_students,
    layer_of,
    load,
    read,
    read_about,
    read_config,
    restore,
    save,
    write,
)
from wadi.roles.layers import (
    active,
    adapted_layers,
    attach,
    attached,
    base_tensors,
    fuse,
    parameters,
    refuse_adapted,
    state_dict,
    trained_parameters,
)
from wadi.roles.merged import merged_weights

__all__ = [
    "CONFIG",
    "FILES",
    "WEIGHTS",
    "About",
    "active",
    "adapted_layers",
    "attach",
    "attached",
    "base_tensors",
    "check_lorad",
    "enable_checkpointing",
    "fuse",
    "fuse_folders",
    "is_students",
    "layer_of",
    "load",
    "merged_weights",
    "parameters",
    "read",
    "read_about",
    "read_config",
    "refuse_adapted",
    "restore",
    "save",
    "state_dict",
    "trained_parameters",
    "write",
]
