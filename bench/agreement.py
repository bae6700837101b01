"""Compare the metrics of this package with independent implementations, on the same features, embeddings and pixels.

    python -m venv agreement
    agreement/bin/pip install . -c constraints.txt
    agreement/bin/pip install --no-deps pytorch-fid==0.3.0 clean-fid==0.1.35 torch-fidelity==0.4.0 prdc==0.2 \\
        torchmetrics==1.9.0
    agreement/bin/pip install scipy scikit-learn
    agreement/bin/python bench/agreement.py --json bench/results/agreement.json

pytorch-fid, clean-fid and torch-fidelity import torchvision, which would bring its own torch, and torchmetrics imports
torch-fidelity if that is installed. Of these, only the functions that contain the formula are compiled, unchanged, from the
installed file ("own function"). prdc, and the one file of clean-fid that resizes, are imported ("imported"). The exit code is
1 if a difference exceeds its limit.
"""

import argparse
import ast
import importlib.util
import json
import platform
import sys
import time
import typing
from importlib.metadata import distribution, version
from pathlib import Path

import numpy as np
import torch
from scipy import linalg
from tqdm import tqdm

from wadi.metrics.clip import cosines
from wadi.metrics.frechet import Moments, frechet_distance, moments
from wadi.metrics.kernel import kernel_distance
from wadi.metrics.neighbours import prdc
from wadi.metrics.resize import resize

RELATIVE = 1e-6


def installed(package: str, file: str) -> Path:
    """Return a file of an installed distribution without importing anything."""
    return Path(distribution(package).locate_file(file))


def own_functions(package: str, file: str, names: list[str], **visible):
    """Return functions of a module as they are in its file, without its imports. They see one another and ``visible``."""
    tree = ast.parse(installed(package, file).read_text())
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
    assert len(tree.body) == len(names), f"{package} no longer has all of {names} in {file}"
    exec(compile(tree, str(installed(package, file)), "exec"), visible)
    return [visible[name] for name in names]


def module(package: str, file: str):
    """Load a single file of a package as a module, without the package's ``__init__``."""
    spec = importlib.util.spec_from_file_location(f"alone_{Path(file).stem}", installed(package, file))
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def features(n: int, d: int, seed: int, scale: float = 1.0, shift: float = 0.0, decay: float = 0.0) -> torch.Tensor:
    """Return correlated features of unequal variances, as networks give them: direction ``i`` falls as ``(i + 1)^-decay``."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=generator, dtype=torch.float64) / d**0.5
    mix = mix * torch.arange(1, d + 1, dtype=torch.float64).pow(-decay)[:, None]
    return scale * torch.randn(n, d, generator=generator, dtype=torch.float64) @ mix + shift


def embedded(rows: torch.Tensor, d: int) -> torch.Tensor:
    """Return features rotated into ``d`` dimensions: every covariance is singular, every distance stays."""
    turn = torch.linalg.qr(torch.randn(d, rows.shape[1], generator=torch.Generator().manual_seed(9), dtype=torch.float64)).Q
    return rows @ turn.T


def row(what: str, against: str, how: str, ours: float, theirs: float, allowed: float, note: str = "") -> dict:
    """Return one comparison. ``allowed`` is the largest relative difference; 0 means equality."""
    difference = abs(ours - theirs) / max(abs(theirs), 1e-300) if ours != theirs else 0.0
    agrees = bool(difference <= allowed)
    values = {"what": what, "against": against, "how": how, "ours": ours, "theirs": theirs, "difference": difference}
    return values | {"allowed": allowed, "agrees": agrees} | ({"note": note} if note else {})


def frechet_rows() -> list[dict]:
    formulas = {
        "pytorch-fid": ("pytorch_fid/fid_score.py", "calculate_frechet_distance"),
        "clean-fid": ("cleanfid/fid.py", "frechet_distance"),
    }
    low = features(400, 64, 5), features(300, 64, 6, 1.3, 0.1)
    cases = {
        "2000 and 1500 images, 256 dimensions": (features(2000, 256, 1), features(1500, 256, 2, 1.2, 0.1)),
        "the same, variances from 1 to 1e-5": (features(2000, 256, 1, decay=1), features(1500, 256, 2, 1.2, 0.1, decay=1)),
        "100 and 150 images, 256 dimensions (fewer than dimensions)": (features(100, 256, 3), features(150, 256, 4, 1.2, 0.1)),
        "400 and 300 images, 64 of 256 dimensions used (singular)": tuple(embedded(part, 256) for part in low),
    }
    rows = []
    for what, (a, b) in cases.items():
        statistics = [moments(part) for part in (a, b)]
        from_features, from_statistics = frechet_distance(a, b), frechet_distance(*statistics)
        streamed = frechet_distance(*(streamed_moments(part) for part in (a, b)))
        for package, (file, name) in formulas.items():
            (formula,) = own_functions(package, file, [name], np=np, linalg=linalg)
            (mu_1, cov_1), (mu_2, cov_2) = ((mean.numpy(), cov.numpy()) for mean, cov in statistics)
            theirs = float(formula(mu_1, cov_1, mu_2, cov_2))
            for label, ours in (("features", from_features), ("statistics", from_statistics), ("streamed", streamed)):
                rows.append(row(f"Frechet distance from {label}: {what}", package, "own function", ours, theirs, RELATIVE))
    truth = frechet_distance(*low)
    for label, ours in (("features", from_features), ("statistics", from_statistics)):
        note = "the 64 dimensions alone, where no covariance is singular"
        rows.append(row(f"Frechet distance from {label}: {what}", "its invariance", "derived anew", ours, truth, 1e-9, note))
    return rows


def streamed_moments(rows: torch.Tensor) -> Moments:
    statistics = Moments(rows.shape[1])
    for part in rows.split(37):
        statistics.update(part)
    return statistics


def kernel_rows() -> list[dict]:
    defaults = module("torch-fidelity", "torch_fidelity/defaults.py").DEFAULTS
    helpers = own_functions(
        "torch-fidelity", "torch_fidelity/helpers.py", ["vassert", "vprint", "get_kwarg"], DEFAULTS=defaults, sys=sys
    )
    estimator = own_functions(
        "torch-fidelity",
        "torch_fidelity/metric_kid.py",
        ["mmd2", "kernel_poly", "kernel_rbf", "kernel_mmd", "kid_features_to_metric"],
        np=np,
        torch=torch,
        tqdm=tqdm,
        vassert=helpers[0],
        vprint=helpers[1],
        get_kwarg=helpers[2],
        KEY_METRIC_KID_MEAN="mean",
        KEY_METRIC_KID_STD="std",
    )[-1]
    rows = []
    a, b = features(1500, 128, 1), features(1200, 128, 2, 1.0, 0.1)
    for subsets, size, seed in ((100, 1000, 2020), (20, 50, 7)):
        theirs = estimator(a, b, kid_subsets=subsets, kid_subset_size=size, rng_seed=seed, verbose=False)
        ours = kernel_distance(a, b, subsets, size, seed)
        for part, value in (("mean", ours.value), ("standard deviation", ours.std)):
            other = theirs["mean" if part == "mean" else "std"]
            what = f"kernel distance, {part} over {subsets} subsets of {size}"
            rows.append(row(what, "torch-fidelity", "own function", value, other, RELATIVE))
    return rows


def neighbour_rows() -> list[dict]:
    from prdc import compute_prdc

    rows = []
    for n, m, d, k in ((900, 700, 64, 3), (500, 800, 16, 5), (300, 300, 256, 1)):
        real, fake = features(n, d, 1), features(m, d, 2, 0.9, 0.05)
        theirs = compute_prdc(real.numpy(), fake.numpy(), k)
        ours = prdc(real, fake, k, block=128)
        for name in ("precision", "recall", "density", "coverage"):
            # The density is a mean of whole numbers over k, and the two divide in a different order.
            allowed = 1e-12 if name == "density" else 0.0
            what = f"{name}, {n} real and {m} fake, {d} dimensions, k = {k}"
            rows.append(row(what, "prdc", "imported", getattr(ours, name), float(theirs[name]), allowed))
    return rows


class StoredEmbeddings:
    """A stand-in for torchmetrics' model and processor that returns stored embeddings."""

    config = None

    def __init__(self, images: torch.Tensor, texts: torch.Tensor) -> None:
        self.images, self.texts = images, texts

    def to(self, device: torch.device) -> "StoredEmbeddings":
        return self

    def __call__(self, **inputs) -> dict[str, torch.Tensor]:
        return {"pixel_values": torch.zeros(1), "input_ids": torch.zeros(1), "attention_mask": torch.zeros(1, 1)}

    def get_image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.images

    def get_text_features(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.texts


def clip_rows() -> list[dict]:
    names = ["_detect_modality", "_process_image_data", "_process_text_data", "_get_features", "_clip_score_update"]
    annotations = {name: getattr(typing, name) for name in ("Any", "List", "Literal", "Union", "cast")}
    update = own_functions(
        "torchmetrics",
        "torchmetrics/functional/multimodal/clip_score.py",
        names,
        torch=torch,
        Tensor=torch.Tensor,
        _CLIPModel=StoredEmbeddings,
        _CLIPProcessor=StoredEmbeddings,
        **annotations,
    )[-1]
    images, texts = features(64, 512, 1), features(64, 512, 2) + 0.3 * features(64, 512, 1)
    stored = StoredEmbeddings(images, texts)
    scores, _ = update(list(torch.zeros(64, 3, 2, 2)), ["a prompt"] * 64, stored, stored)
    ours = cosines(images, texts)
    rows = [
        row(
            "CLIP score, 100 times the mean cosine",
            "torchmetrics",
            "own function",
            float(100 * ours.mean()),
            float(scores.mean()),
            RELATIVE,
        )
    ]
    worst = int((100 * ours - scores).abs().argmax())
    what = f"CLIP score of one image, the one that differs most of {len(ours)}"
    return [*rows, row(what, "torchmetrics", "own function", float(100 * ours[worst]), float(scores[worst]), RELATIVE)]


def resize_rows() -> list[dict]:
    theirs = module("clean-fid", "cleanfid/resize.py").build_resizer
    rows = []
    for height, width in ((512, 512), (256, 256), (64, 64), (427, 640), (299, 299), (33, 500)):
        image = torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(height), dtype=torch.uint8)
        for ours, mode in (("clean", "clean"), ("legacy-torch", "legacy_pytorch")):
            expected = torch.from_numpy(theirs(mode)(image.permute(1, 2, 0).numpy())).permute(2, 0, 1)
            differing = int((resize(image, 299, ours) != expected).sum())
            what = f"resize {height}x{width} to 299x299, filter {ours}: pixels that differ"
            rows.append(row(what, "clean-fid", "imported", float(differing), 0.0, 0.0))
    return rows


def markdown(rows: list[dict]) -> str:
    lines = ["| what | against | how | ours | theirs | relative difference | |", "|---|---|---|---|---|---|---|"]
    for r in rows:
        verdict = "agrees" if r["agrees"] else "DIFFERS"
        values = f"{r['ours']:.10g} | {r['theirs']:.10g} | {r['difference']:.1e}"
        lines.append(f"| {r['what']} | {r['against']} | {r['how']} | {values} | {verdict} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    args = parser.parse_args()
    start = time.perf_counter()
    rows = [*frechet_rows(), *kernel_rows(), *neighbour_rows(), *clip_rows(), *resize_rows()]
    packages = (
        "pytorch-fid",
        "clean-fid",
        "torch-fidelity",
        "prdc",
        "torchmetrics",
        "torch",
        "numpy",
        "scipy",
        "scikit-learn",
        "pillow",
    )
    about = {"python": platform.python_version(), **{name: version(name) for name in packages}}
    print(markdown(rows))
    print(json.dumps(about), f"{time.perf_counter() - start:.0f} s")
    if args.json:
        args.json.write_text(json.dumps({"versions": about, "rows": rows}, indent=1) + "\n")
    sys.exit(0 if all(r["agrees"] for r in rows) else 1)


if __name__ == "__main__":
    main()
