"""Load the networks behind the names of metrics. Each has a protocol with the digest of its weights."""

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
# Names that --weights takes: the weights of a scorer, or of its tokenizer or CLIP.
WEIGHTS = (*SCORERS, "clip.tokenizer", "pickscore.tokenizer", "hpsv2.tokenizer", "imagereward.tokenizer", "aesthetic.clip")


@dataclass(frozen=True)
class Scorer:
    """A network that scores images by their prompts.

    ``score(images, prompts)`` returns a value for each image, ``(n,)``. ``about`` is what two such values must share to be
    comparable.
    """

    score: Callable[[Sequence[Tensor], Sequence[str]], Tensor]
    about: dict[str, Any]

    def __call__(self, images: Sequence[Tensor], prompts: Sequence[str] | None) -> Tensor:
        return self.score(images, prompts if prompts is not None else [""] * len(images))

    def protocol(self) -> dict[str, Any]:
        """Return what two scores must share to be comparable."""
        return self.about


def feature_network(
    chosen: str | Extractor,
    resize: str = "clean",
    device: str = "cpu",
    inception: str | Path | None = None,
    download: bool = False,
) -> Extractor:
    """Load the network that ``chosen`` names: 'embedded', 'inception', 'dinov2', 'dinov2:NAME' or 'zoo'.

    An extractor is returned as it is.

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
    raise WadiError(f"--features is {chosen!r}. It must be embedded, inception, dinov2, dinov2:NAME or zoo.")


def zoo_features(device: str = "cpu") -> Extractor:
    """Return the 96 penultimate activations of the zoo's classifier as an extractor.

    The classifier was trained on the teacher's data, so these features see less than those of a general network.
    """
    from wadi.io.files import sha256
    from wadi.zoo import classifier_path, load_classifier
    from wadi.zoo.judge import FEATURES

    classifier = load_classifier().to(device)
    digest = sha256(classifier_path() / "model.safetensors")
    return Extractor("zoo-classifier", digest, 64, FEATURES, "clean", lambda x: classifier.features(x / 255), device)


def scorer(name: str, weights: Mapping[str, str] | None = None, device: str = "cpu") -> Scorer:
    """Load a network that scores images by their prompts.

    Args:
        name: one of `SCORERS`.
        weights: paths or Hub ids by the names in `WEIGHTS`; the published ones where a name is missing.
    Raises:
        WadiError: if a name is unknown, or weights are not on this machine and cannot be downloaded.
    """
    places = dict(weights or {})
    if unknown := sorted(places.keys() - set(WEIGHTS)):
        raise WadiError(f"--weights names {unknown[0]!r}. Write NAME=PATH with one of the names {', '.join(WEIGHTS)}.")
    place = places.get(name)
    tokenizer = {"tokenizer": places[f"{name}.tokenizer"]} if f"{name}.tokenizer" in places else {}
    from wadi.metrics import clip, preference

    if name == "clip":
        model = clip.load_clip(place or clip.VIT_B_32, device, **tokenizer)
        # Results name a folder without its path; the digest identifies its weights.
        about = {**model.protocol(), "network": Path(model.name).name}
        return Scorer(lambda images, prompts: clip.similarities(images, prompts, model), about)
    if name == "pickscore":
        preference_model = preference.pickscore(place or preference.PICKSCORE, device=device, **tokenizer)
    elif name == "hpsv2":
        preference_model = preference.hpsv2(place, device=device, **tokenizer)
    elif name == "imagereward":
        preference_model = preference.image_reward(place, device=device, **tokenizer)
    elif name == "aesthetic":
        preference_model = preference.aesthetic(place, places.get("aesthetic.clip", clip.VIT_L_14), device)
    else:
        raise WadiError(f"Scorer {name!r} does not exist. Use one of {', '.join(SCORERS)}.")
    return Scorer(preference_model, preference_model.protocol())
