"""Train a ControlNet on edges: for a frozen multi-step teacher, or fine-tune one for a frozen one-step student.

Teacher: ``x_t = alpha_t x0 + sigma_t eps`` with ``x0`` the teacher's own picture, ``c`` its edges, and the network's own
denoising loss; only the ControlNet learns. Noisy timesteps, where the layout is decided, come more often:
``t = (1 - u^3) T`` (Mou et al. 2023).

Student: asked once, at its timestep ``t*``, and judged by the picture that comes out:

    x0_hat = student(alpha x0 + sigma eps, t*, c)
    loss   = picture_weight mean (x0_hat - x0)^2  +  edge_weight mean |s(decode x0_hat) - s(decode x0)|
             + keep_weight mean (r - r_0)^2

``s`` is a soft edge map (`conditions.soft_edges`). The input is the picture noised to ``t*`` rather than noise alone: what
little of it shines through tells the colours, which edges and prompt leave open and a squared error would average to grey.
``r - r_0`` (off by default) is how far the ControlNet's residuals are from those it started with.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wadi.backbones import Backbone, Condition, from_pipeline
from wadi.backbones.digest import loaded_digest, tensors_digest
from wadi.diffusion.schedulers import timestep_of
from wadi.distill.checkpoints import fingerprint
from wadi.distill.objectives.denoise import denoising_loss
from wadi.distill.run_folder import stop_on_signals
from wadi.distill.schedules import cosine, rise
from wadi.errors import WadiError, first_line
from wadi.extras.control.conditions import soft_edges
from wadi.extras.control.data import Pictures, chosen_prompts, draw_pictures, load, save, stored
from wadi.extras.control.fit import refuse_misfit
from wadi.extras.control.network import controlled, controlnet_of
from wadi.io.files import whole_folder, write_whole
from wadi.io.moments import moments_of, restore_moments
from wadi.io.progress import progress
from wadi.io.records import parse_json
from wadi.sampling import check_steps

PICTURE_SEED = 1_000_000  # of the first picture to learn from: away from the small seeds that people and tests use
COUNTS = {"pictures": 1_000_000, "picture_steps": 1000, "steps": 10_000_000, "batch": 65_536, "save_every": 10_000_000}
LARGEST_WEIGHT = 1000.0
SEEDS = 2**40  # generators are seeded with a million times the seed, plus the step, below 2^63


@dataclass(frozen=True)
class ControlConfig:
    """Settings of a training; the defaults made the shipped ControlNet of the embedded teacher."""

    out: str = "runs/control"  # folder; the same command continues an interrupted training
    pictures: int = 1024  # drawn by the teacher, once
    picture_steps: int = 10  # of the teacher's sampler
    guidance_scale: float = 2.5  # of the pictures
    steps: int = 900  # of training, in all
    batch: int = 16
    lr: float = 1e-3  # of Adam; rises for 30 steps, then falls to 0 as a cosine
    drop: float = 0.1  # prompts replaced by the empty one, so that guidance works; 0 against a student
    picture_weight: float = 1.0  # against a student: of its picture, a squared error, which blurs
    edge_weight: float = 2.0  # against a student: of the edges of its picture
    keep_weight: float = 0.0  # against a student: of staying near the residuals it started with
    slim: bool = True  # a ControlNet without attention, see control_net
    seed: int = 0
    save_every: int = 100  # steps between checkpoints

    def __post_init__(self) -> None:
        for name, largest in COUNTS.items():
            if not 1 <= getattr(self, name) <= largest:
                raise WadiError(f"{name} is {getattr(self, name)}. Expected a whole number from 1 to {largest:,}.")
        for name in ("picture_weight", "edge_weight", "keep_weight", "guidance_scale"):
            if not 0 <= getattr(self, name) <= LARGEST_WEIGHT:
                raise WadiError(f"{name} is {getattr(self, name)}. Expected a number from 0 to {LARGEST_WEIGHT:g}.")
        if not 0 < self.lr <= 1 or not 0 <= self.drop <= 1:
            raise WadiError(f"lr is {self.lr} and drop is {self.drop}. Expected an lr above 0 and at most 1, a drop of 0 to 1.")
        if not 0 <= self.seed < SEEDS:
            raise WadiError(f"seed is {self.seed}. Expected a whole number from 0 to {SEEDS - 1:,}.")


# --- losses -----------------------------------------------------------------------------------------------------------------


def noisy_timesteps(count: int, total: int, generator: torch.Generator) -> Tensor:
    """``count`` timesteps ``(1 - u^3) total``, most of them late (noisy)."""
    u = torch.rand(count, generator=generator)
    return ((1 - u**3) * total).long().clamp(max=total - 1)


def teacher_loss(
    backbone: Backbone, controlnet: nn.Module, x0: Tensor, image: Tensor, condition: Condition, noise: Tensor, t: Tensor
) -> Tensor:
    """The frozen network's denoising loss under the ControlNet; ``x0 (B, C, h, w)``, ``image (B, 3, H, W)``, ``t (B,)``."""
    x_t = backbone.process.add_noise(x0, noise, t)
    with controlled(backbone.network, controlnet, image):
        predicted = backbone.predict(x_t, t, condition)
    return denoising_loss(predicted, x0, noise, x_t, t, backbone.process, "none")


def student_x0(
    backbone: Backbone, controlnet: nn.Module, x_t: Tensor, image: Tensor, condition: Condition, timestep: int
) -> Tensor:
    """The student's one-step ``x0`` under the ControlNet."""
    t = torch.full((len(x_t),), timestep, device=x_t.device)
    with controlled(backbone.network, controlnet, image):
        return backbone.process.x0(backbone.predict(x_t, t, condition), x_t, t)


def edge_loss(backbone: Backbone, x0: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference of the soft edge maps of two batches of latents, decoded."""
    with torch.no_grad():
        target_edges = soft_edges(backbone.decode_with_gradient(target))
    return (soft_edges(backbone.decode_with_gradient(x0)) - target_edges).abs().mean()


# --- the loop ---------------------------------------------------------------------------------------------------------------


def rate(step: int, steps: int, warmup: int = 30) -> float:
    """Share of the learning rate at ``step``: a ramp, then a cosine to 0."""
    return rise(step + 1, warmup) * cosine(step, steps)


def train(config: ControlConfig, teacher: Any, prompts: Sequence[str], student: Any = None, start: Any = None) -> Path:
    """Train a ControlNet on edges; the folder ``OUT/controlnet``, which diffusers loads.

    Args:
        teacher: pipeline that draws the pictures and, without a student, is the one to steer.
        student: one-step pipeline to fine-tune against.
        start: ControlNet to go on from; None = a new one, copied from the network.
    Raises:
        WadiError: if the model is no U-Net, ``start`` does not fit it, or ``OUT`` holds a training of other settings.
    """
    drawer = from_pipeline(teacher)
    backbone = drawer if student is None else from_pipeline(student)
    if backbone.component != "unet":
        raise WadiError(
            f"The teacher is a {type(teacher).__name__}. Expected a U-Net family (SD, SDXL) to train a ControlNet for."
        )
    check_steps(drawer, config.picture_steps, "picture_steps")
    out = Path(config.out)
    place, state = out / "controlnet", out / "training.safetensors"
    if place.exists() and not state.is_file():
        raise _not_ours(place)
    controlnet = start if start is not None else _fresh(config, backbone)
    refuse_misfit(teacher if student is None else student, controlnet)
    timestep = None if student is None else timestep_of(student.scheduler)
    note = dataclasses.asdict(config) | {"out": "", "save_every": 0, "network": fingerprint(backbone.network)}
    note |= {
        "teacher": loaded_digest(teacher),
        "student": None if student is None else tensors_digest(backbone.network.state_dict()),
        "timestep": timestep,
        "start": None if start is None else tensors_digest(start.state_dict()),
    }
    refuse_other(state, note)
    pictures = _pictures(config, drawer, prompts, out / "pictures.safetensors")
    note["images"] = tensors_digest({"latents": pictures.latents, "edges": pictures.edges}, json.dumps(pictures.prompts))
    refuse_other(state, note)
    run = _Run(config, backbone, timestep, controlnet, pictures)
    run.resume(state, json.dumps(note))
    if place.exists():
        if run.step < config.steps or not _is_written(place, controlnet):
            raise _not_ours(place)
        return place
    run.loop()
    with whole_folder(place) as folder:
        copy.deepcopy(controlnet).half().save_pretrained(folder)
    return place


def _not_ours(place: Path) -> WadiError:
    return WadiError(
        f"{str(place)!r} exists and is not the result of this training, which would replace it. Move it elsewhere, or choose "
        "another --out."
    )


def _is_written(place: Path, controlnet: nn.Module) -> bool:
    """Whether ``place`` holds the weights of ``controlnet``, in half precision as `train` writes them."""
    file = place / "diffusion_pytorch_model.safetensors"
    if not file.is_file():
        return False
    tensors, _ = stored(file, "write it anew")
    wanted = controlnet.state_dict()
    return tensors.keys() == wanted.keys() and all(torch.equal(tensors[k], v.half().cpu()) for k, v in wanted.items())


def refuse_other(path: Path, note: Mapping[str, Any]) -> None:
    """Raise `WadiError`, naming what differs, if the training stored at ``path`` is not the one that ``note`` describes.

    A training that was stored before a setting existed agrees with any value of it.
    """
    if not path.is_file():
        return
    _, about = stored(path, "start anew")
    try:
        own = parse_json(about["note"], dict[str, Any], "Its note")
        differing = [f"{name} {own[name]!r} (now {note[name]!r})" for name in note if name in own and own[name] != note[name]]
    except (KeyError, TypeError, ValueError) as error:
        raise WadiError(f"{str(path)!r} is damaged ({error!r}). Delete it to start anew.") from error
    if differing:
        raise WadiError(
            f"{str(path.parent)!r} contains a training with other settings: {', '.join(differing)}. Restore them to continue "
            "it, or choose another --out."
        )


def _fresh(config: ControlConfig, backbone: Backbone) -> Any:
    torch.manual_seed(config.seed)
    return controlnet_of(backbone.network, backbone.scale, config.slim).to(backbone.device)


def _pictures(config: ControlConfig, drawer: Backbone, prompts: Sequence[str], path: Path) -> Pictures:
    names = ("pictures", "picture_steps", "guidance_scale", "seed")
    about = {name: getattr(config, name) for name in names} | {"teacher": fingerprint(drawer.network), "prompts": len(prompts)}
    chosen = chosen_prompts(prompts, config.pictures, config.seed)
    earlier = json.dumps(about)  # notes of earlier versions lack the digest
    note = json.dumps(about | {"digest": loaded_digest(drawer.pipeline)})
    found = load(path, (note, earlier), chosen)
    if found is None:
        found = draw_pictures(drawer, chosen, PICTURE_SEED + config.seed, config.picture_steps, config.guidance_scale)
        save(path, found, note)
    return found


class _Run:
    """What a training is at a step. Batches and noise are functions of seed and step, so resuming needs no generator."""

    def __init__(
        self, config: ControlConfig, backbone: Backbone, timestep: int | None, controlnet: Any, pictures: Pictures
    ) -> None:
        self.config, self.backbone, self.timestep, self.pictures = config, backbone, timestep, pictures
        self.first = copy.deepcopy(controlnet).requires_grad_(False).eval() if config.keep_weight else None
        self.controlnet = controlnet.float().requires_grad_(True).train()
        backbone.network.requires_grad_(False).eval()
        backbone.pipeline.vae.requires_grad_(False)
        self.optimizer = torch.optim.AdamW(controlnet.parameters(), lr=config.lr, weight_decay=1e-2)
        with torch.no_grad():
            parts = [backbone.encode(pictures.prompts[i : i + 64]) for i in range(0, len(pictures.prompts), 64)]
        self.encoded, self.null = Condition.cat(parts), backbone.encode([""])
        self.step, self.path, self.note = 0, Path(), ""

    def loss(self, step: int) -> Tensor:
        """Of the batch that belongs to ``step``."""
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + step)
        rows = torch.randint(len(self.pictures.latents), (self.config.batch,), generator=generator)
        device = self.backbone.device
        x0 = self.pictures.latents[rows].float()
        noise = torch.randn(x0.shape, generator=generator).to(device)
        x0, image = x0.to(device), self.pictures.conditions(rows).to(device)
        if self.timestep is not None:
            return self._student_loss(x0, image, self.encoded[rows], noise, self.timestep)
        dropped = torch.rand(len(rows), generator=generator) < self.config.drop
        t = noisy_timesteps(len(rows), self.backbone.process.num_timesteps, generator).to(device)
        return teacher_loss(self.backbone, self.controlnet, x0, image, self._with_null(rows, dropped), noise, t)

    def _with_null(self, rows: Tensor, dropped: Tensor) -> Condition:
        both = Condition.cat([self.encoded[rows], self.null])
        index = torch.where(dropped, torch.tensor(len(rows)), torch.arange(len(rows)))
        return both[index]

    def _student_loss(self, x0: Tensor, image: Tensor, condition: Condition, noise: Tensor, timestep: int) -> Tensor:
        config, t = self.config, torch.full((len(x0),), timestep, device=x0.device)
        x_t = self.backbone.process.add_noise(x0, noise, t)
        drawn = student_x0(self.backbone, self.controlnet, x_t, image, condition, timestep)
        loss = config.picture_weight * (drawn - x0).square().mean()
        if config.edge_weight:
            loss = loss + config.edge_weight * edge_loss(self.backbone, drawn, x0)
        if self.first is not None:
            loss = loss + config.keep_weight * self._drift(self.first, x_t, t, image, condition)
        return loss

    def _drift(self, first: Any, x_t: Tensor, t: Tensor, image: Tensor, condition: Condition) -> Tensor:
        """Mean squared distance of the ControlNet's residuals from those of the one that it started as."""
        told = condition.tensors
        added = {"text_embeds": told["pooled"], "time_ids": told["time_ids"]} if "pooled" in told else None
        inputs = {"encoder_hidden_states": told["prompt_embeds"], "controlnet_cond": image, "added_cond_kwargs": added}
        now, then = (net(x_t, t, return_dict=False, **inputs) for net in (self.controlnet, first))
        pairs = zip([*now[0], now[1]], [*then[0], then[1]], strict=True)
        return torch.stack([(a - b).square().mean() for a, b in pairs]).mean()

    def loop(self) -> None:
        """Train to the last step, saving now and then.

        Raises:
            Interrupted: on SIGINT, SIGTERM or SIGHUP, after saving.
        """
        config, recent = self.config, 0.0
        with stop_on_signals() as stop, progress("training the ControlNet", config.steps, self.step) as bar:
            while self.step < config.steps:
                for group in self.optimizer.param_groups:
                    group["lr"] = config.lr * rate(self.step, config.steps)
                loss = self.loss(self.step)
                loss.backward()
                norm = nn.utils.clip_grad_norm_(self.controlnet.parameters(), 1.0)
                if not torch.isfinite(norm):
                    raise WadiError(f"The gradient of step {self.step} is not finite. Expected a lower --lr; nothing is lost.")
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                recent = loss.item() if recent == 0 else 0.95 * recent + 0.05 * loss.item()
                self.step += 1
                bar.advance({"loss": recent})
                if stop.agreed() or self.step % config.save_every == 0 or self.step == config.steps:
                    self.save()
                if stop.signal is not None:
                    raise stop.interrupted(f"Stopped at step {self.step} of {config.steps}, saved. The same command continues.")
        self.controlnet.eval()

    def save(self) -> None:
        """The ControlNet and Adam's moments in one file."""
        from safetensors.torch import save as to_bytes

        tensors = {f"net.{name}": value for name, value in self.controlnet.state_dict().items()}
        tensors |= moments_of(self.optimizer, "adam.")
        plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        write_whole(self.path, to_bytes(plain, {"step": str(self.step), "note": self.note}))

    def resume(self, path: Path, note: str) -> None:
        """Go on from ``path`` if it is there, bit for bit; see `refuse_other` for whether it is the same training.

        Raises:
            WadiError: if it is damaged.
        """
        self.path, self.note = path, note
        if not path.is_file():
            return
        tensors, about = stored(path, "start anew")
        weights = {k[4:]: v for k, v in tensors.items() if k.startswith("net.")}
        try:
            self.step = int(about["step"])
            self.controlnet.load_state_dict(weights)
        except (KeyError, ValueError, RuntimeError) as error:
            raise WadiError(f"{str(path)!r} is damaged ({first_line(error)}). Delete it to start anew.") from error
        restore_moments(self.optimizer, tensors, "adam.")
