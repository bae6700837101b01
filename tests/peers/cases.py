"""LoRaD's rows for the case tables of PEFT's tests."""

from wadi.lorad import LoRaDConfig

UNET = ["proj_in", "proj_out", "to_k", "to_q", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
TEXT = ["k_proj", "q_proj", "v_proj", "out_proj", "fc1", "fc2"]

CUSTOM = [
    (f"LoRaD {name}", model, LoRaDConfig, kwargs)
    for name, model, kwargs in [
        ("MLP lin0", "MLP", {"r": 4, "target_modules": "lin0"}),
        ("MLP list", "MLP", {"r": 4, "target_modules": ["lin0"]}),
        ("MLP two", "MLP", {"r": 4, "target_modules": ["lin0", "lin1"], "rank_pattern": {"lin1": 2}}),
        ("MLP recompute", "MLP", {"r": 4, "target_modules": ["lin0", "lin1"], "recompute": True}),
        ("MLP modules_to_save", "MLP", {"r": 4, "target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
        ("Conv2d odd fan-in", "Conv2d", {"r": 4, "target_modules": ["conv2d"]}),
        ("Conv2d and linear", "Conv2d", {"r": 4, "target_modules": ["conv2d", "lin0"], "recompute": True}),
        ("Conv2d grouped", "Conv2dGroups", {"r": 2, "target_modules": ["conv2d"]}),
        ("Conv2d grouped 2", "Conv2dGroups2", {"r": 2, "target_modules": ["conv2d"], "recompute": True}),
    ]
]

_SAME = {"r": 4, "target_modules": ["lin0"], "init_weights": False}
_OTHER = {"r": 4, "target_modules": ["lin1"], "init_weights": False}
MULTIPLE = [
    ("LoRaD Same", "lorad", LoRaDConfig, _SAME, _SAME),
    ("LoRaD Different", "lorad", LoRaDConfig, _SAME, _OTHER),
]


def _mixed(name, first, second):
    return [(f"LoRaD {name}", LoRaDConfig(init_weights=False, **first), LoRaDConfig(init_weights=False, **second))]


_LIN0, _LIN1 = {"r": 4, "target_modules": ["lin0"]}, {"r": 4, "target_modules": ["lin1"]}
_SAVED = {**_LIN0, "modules_to_save": ["lin1"]}
MIXED = {
    "test_mixed_adapter_batches_mlp": _mixed("mixed", _LIN0, {**_LIN0, "r": 16}),
    "test_mixed_adapter_batches_different_target_layers": _mixed("different layers", _LIN0, _LIN1),
    "test_mixed_adapter_batches_multiple_modules_to_save": _mixed("modules to save", _SAVED, _SAVED),
    "test_mixed_adapter_batches_partly_overlapping_target_layers": _mixed(
        "overlapping", _LIN0, {"r": 4, "target_modules": ["lin0", "lin1"]}
    ),
}

DECODER = [(LoRaDConfig, {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "v_proj"], "bias": "none"})]
DIFFUSERS = [
    (
        LoRaDConfig,
        {
            "text_encoder": {"r": 4, "target_modules": TEXT, "init_weights": False},
            "unet": {"r": 4, "target_modules": UNET, "init_weights": False},
        },
    )
]
