"""The networks behind the names of metrics: loaded on demand, each telling what it is and the digest of its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from wadi.errors import WadiError
from wadi.metrics import features
from wadi.metrics.features import Extractor

SCORERS = ("clip", "pickscore", "hpsv2", "imagereward", "aesthetic")
# What --weights can name: a scorer's own weights, and what goes with them.
WEIGHTS = (*SCORERS, "clip.tokenizer", "pickscore.tokenizer", "hpsv2.tokenizer", "imagereward.tokenizer", "aesthetic.clip")


@dataclass(frozen=True)
class Scorer:
    """``score(images, prompts)`` gives a number per image, ``(n,)``; ``about`` is what two such numbers must share."""

    score: Callable[[Sequence[Tensor], Sequence[str]], Tensor]
    about: dict[str, Any]

    def __call__(self, images: Sequence[Tensor], prompts: Sequence[str] | None) -> Tensor:
        return self.score(images, prompts if prompts is not None else [""] * len(images))

    def protocol(self) -> dict[str, Any]:
        """What two numbers must share to be comparable."""
        return self.about


def feature_network(
    chosen: str | Extractor,
    resize: str = "clean",
    device: str = "cpu",
    inception: str | Path | None = None,
    download: bool = False,
) -> Extractor:
    """The network that ``chosen`` names: 'embedded', 'inception', 'dinov2', 'dinov2:NAME' or 'zoo'; an extractor is itself.

    Raises:
        WadiError: if the name is unknown, or the weights are not on this machine.
    """
    if isinstance(chosen, Extractor):
        return chosen
    kind, _, model = chosen.partition(":")
    if kind == "dinov2":
        return features.dinov2(model or features.DINOV2, resize, device)
    if chosen == "inception":
        return features.inception(inception, resize, device, download)
    if chosen == "embedded":
        return features.embedded(resize, device)
    if chosen == "zoo":
        return zoo_features(device)
    raise WadiError(f"--features is {chosen!r}. Expected embedded, inception, dinov2, dinov2:NAME or zoo.")


def zoo_features(device: str = "cpu") -> Extractor:
    """The 96 penultimate activations of the zoo's classifier, which was trained on the teacher's data: the narrower judge."""
    from wadi.io.files import sha256
    from wadi.zoo import classifier_path, load_classifier
    from wadi.zoo.judge import FEATURES

    classifier = load_classifier().to(device)
    digest = sha256(classifier_path() / "model.safetensors")
    return Extractor("zoo-classifier", digest, 64, FEATURES, "clean", lambda x: classifier.features(x / 255), device)


def scorer(name: str, weights: Mapping[str, str] | None = None, device: str = "cpu") -> Scorer:
    """A network that scores images by their prompts.

    Args:
        name: one of `SCORERS`.
        weights: places of weights, by `WEIGHTS`; what is not named takes the published ones.
    Raises:
        WadiError: if weights are unknown, or not on this machine and not to be had.
    """
    given = dict(weights or {})
    if unknown := sorted(given.keys() - set(WEIGHTS)):
        raise WadiError(f"--weights names {unknown[0]!r}. Expected NAME=PATH with a name of {', '.join(WEIGHTS)}.")
    own = given.get(name)
    tokenizer = {"tokenizer": given[f"{name}.tokenizer"]} if f"{name}.tokenizer" in given else {}
    from wadi.metrics import clip, preference

    if name == "clip":
        model = clip.load_clip(own or clip.VIT_B_32, device, **tokenizer)
        # A folder's place is nobody's business: its weights are told by their digest.
        about = {**model.protocol(), "network": Path(model.name).name}
        return Scorer(lambda images, prompts: clip.similarities(images, prompts, model), about)
    if name == "pickscore":
        found = preference.pickscore(own or preference.PICKSCORE, device=device, **tokenizer)
    elif name == "hpsv2":
        found = preference.hpsv2(own, device=device, **tokenizer)
    elif name == "imagereward":
        found = preference.image_reward(own, device=device, **tokenizer)
    elif name == "aesthetic":
        found = preference.aesthetic(own, given.get("aesthetic.clip", clip.VIT_L_14), device)
    else:
        raise WadiError(f"There is no scorer {name!r}. Expected one of {', '.join(SCORERS)}.")
    return Scorer(found, found.protocol())
