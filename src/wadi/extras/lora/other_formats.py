"""Recognise files that are not a LoRA, so that the message can say what they are."""

from __future__ import annotations

import re
from pathlib import Path

from wadi.errors import WadiError
from wadi.io.weight_checks import first_names
from wadi.lorad.stored import is_factor

MERGE = "Merge it into the teacher with the tool that trained it, and use the merged model."

# (pattern of a key, the format it belongs to, what to do with it)
_FORMATS = (
    (r"^image_proj\.|^ip_adapter\.", "an IP-Adapter", "Use it with --control."),
    (r"^(controlnet_|control_model\.|lora_controlnet)|\.zero_convs\.", "a ControlNet", "Use it with --control."),
    (r"^(emb_params|string_to_param|clip_[lg]|<[^>]*>)$", "a textual inversion", "Use it with --token."),
    (r"^model\.diffusion_model\.|^first_stage_model\.|^cond_stage_model\.", "a whole checkpoint", "Convert it to a pipeline "
     "folder (StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER)) and use it as --teacher."),
    (r"oft_(diag|blocks|[rRsS]\b)|boft_", "an OFT or BOFT adapter", ""),
    (r"\.on_input$|ia3_", "an (IA)^3 adapter", ""),
    (r"\.(diff|diff_b|set_weight)$", "a file of whole weight differences", ""),
    (r"glora_|\.[ab][12]\.weight$", "a GLoRA", ""),
    (r"lora_embedding_|modules_to_save", "an adapter that also trains embeddings or whole layers", ""),
    (r"^bundle_emb\.", "a LoRA with textual inversions bundled in", "Take the tensors named bundle_emb.* out of the file."),
    (r"\.[wb]_norm$", "a LyCORIS file that also trains normalisation layers", ""),
    (r"vera_lambda|\.lora_E$|ranknum", "an AdaLoRA or VeRA", ""),
)  # fmt: skip


def check_known_keys(path: Path, unknown_keys: list[str], total: int) -> None:
    """Raise `WadiError` if there are ``unknown_keys``. The message names the file's format if it is a known one.

    Args:
        total: number of tensors in the file.
    """
    for key in unknown_keys:
        if described := _describe(key):
            kind, remedy = described
            raise WadiError(f"{str(path)!r} is {kind} (it has {key}), which --lora cannot apply. {remedy or MERGE}")
    if unknown_keys:
        raise WadiError(
            f"LoRA {str(path)!r} has {len(unknown_keys)} of {total} keys that fit no layer and no format known here: "
            f"{first_names(unknown_keys)}. Supported are LoRA (with Tucker decomposition, DoRA), LoHa and LoKr."
        )


def _describe(key: str) -> tuple[str, str] | None:
    """Return ``(format, what to do)``, or None if no known format has such a key."""
    if is_factor(key):
        return "a LoRaD adapter", "Give the folder that contains the file."
    return next(((kind, remedy) for pattern, kind, remedy in _FORMATS if re.search(pattern, key)), None)
