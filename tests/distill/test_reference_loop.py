"""The training loop against one written again here, in plain torch and float64, from the method's formulas alone.

The other tests of training compare the loop with itself: resumed, recomputed, on several processes. A loop that is wrong in the
same way each time passes them. This one shares two things with the package: the initial angles, and the order of the random
draws, which every resumed run depends on.
"""

import copy
import math

import pytest
import torch
from safetensors.torch import load_file
from torch.func import functional_call
from torch.testing import assert_close

import tiny
from runs import stats_of
from wadi import roles
from wadi.distill import checkpoint_folders, loop
from wadi.distill.loop import distill
from wadi.distill.objectives import with_defaults

T = 1000
SHAPE = (4, 8, 8)
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")


class Reference:
    """Teacher, student and fake model on copies of one U-Net, and their training step by step."""

    def __init__(self, pipeline, config, prompts, start):
        self.config, self.prompts = config, prompts
        self.unet = copy.deepcopy(pipeline.unet).double().eval()
        self.weights = {name: value.detach() for name, value in self.unet.named_parameters()}
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, T, dtype=torch.float64) ** 2
        self.alphas = (1 - betas).cumprod(0).sqrt()
        self.predicts_v = pipeline.scheduler.config.prediction_type == "v_prediction"
        self.encoder, self.words = copy.deepcopy(pipeline.text_encoder).double().eval(), pipeline.tokenizer
        self.generator = torch.Generator().manual_seed(config.seed)
        self.drawn, self.step, self.pairs = 0, 0, None
        self.angles = {role: {k: v.double().clone().requires_grad_() for k, v in start[role].items()} for role in start}
        self.moments = {role: {k: (v.detach() * 0, v.detach() * 0) for k, v in self.angles[role].items()} for role in start}
        self.updates = dict.fromkeys(start, 0)
        self.average = {k: v.detach().clone() for k, v in self.angles["student"].items()}

    # --- the network in a role ----------------------------------------------------------------------------------------------

    def encode(self, prompts):
        ids = self.words(prompts, padding="max_length", max_length=16, truncation=True, return_tensors="pt").input_ids
        with torch.no_grad():
            return self.encoder(ids)[0]

    def predict(self, role, x_t, t, condition):
        """``(x0, eps)`` that the network in ``role`` predicts."""
        weights = dict(self.weights)
        for name in {key.rsplit(".", 1)[0] for key in self.angles.get(role, {})}:
            theta = self.angles[role][name + ".lorad_A"] @ self.angles[role][name + ".lorad_B"]
            even, odd = weights[name + ".weight"][:, 0::2], weights[name + ".weight"][:, 1::2]
            turned = [even * theta.cos() - odd * theta.sin(), even * theta.sin() + odd * theta.cos()]
            weights[name + ".weight"] = torch.stack(turned, dim=-1).flatten(1)
        out = functional_call(self.unet, weights, (x_t, t), {"encoder_hidden_states": condition, "return_dict": False})[0]
        alpha, sigma = self.alpha_sigma(t)
        if self.predicts_v:
            return alpha * x_t - sigma * out, sigma * x_t + alpha * out
        return (x_t - sigma * out) / alpha, out

    def guided(self, role, x_t, t, condition, scale):
        """Guidance is linear, so it may mix images and noises instead of the network's own predictions."""
        with_prompt = self.predict(role, x_t, t, condition)
        without = self.predict(role, x_t, t, self.encode([""] * len(x_t)))
        return [null + scale * (full - null) for full, null in zip(with_prompt, without, strict=True)]

    def alpha_sigma(self, t):
        alpha = self.alphas[t][:, None, None, None]
        return alpha, (1 - alpha**2).sqrt()

    def student(self, z, condition):
        return self.predict("student", z, torch.full((len(z),), self.config.student.timesteps[0]), condition)[0]

    # --- what a step draws --------------------------------------------------------------------------------------------------

    def rows(self, count):
        """The next prompts: every epoch an order of its own."""
        found = []
        for position in range(self.drawn, self.drawn + count):
            epoch, offset = divmod(position, len(self.prompts))
            generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch)
            found.append(int(torch.randperm(len(self.prompts), generator=generator)[offset]))
        return found

    def normal(self, count):
        return torch.randn((count, *SHAPE), generator=self.generator).double()

    def make_pairs(self):
        """The teacher's guided DDIM samples, each from the noise of its own seed and for its own prompt.

        The numbers of steps divide ``T``: otherwise diffusers' DDIM steps to a timestep one beside the next one it evaluates.
        """
        warm = self.config.warm_start
        rows, first = self.rows(warm.pairs), self.config.seed * 1_000_003
        z = torch.cat([torch.randn((1, *SHAPE), generator=torch.Generator().manual_seed(first + i)) for i in range(warm.pairs)])
        x_t, condition = z.double(), self.encode([self.prompts[row] for row in rows])
        times = [round(T - i * T / warm.sampler_steps) - 1 for i in range(warm.sampler_steps)]
        for now, later in zip(times, [*times[1:], None], strict=True):
            with torch.no_grad():
                x0, eps = self.guided(None, x_t, torch.full((len(z),), now), condition, warm.guidance_scale)
            alpha = 1.0 if later is None else float(self.alphas[later])
            x_t = alpha * x0 + (1 - alpha**2) ** 0.5 * eps
        self.pairs = {"z": z.double(), "x0": x_t, "rows": rows}

    # --- one step -----------------------------------------------------------------------------------------------------------

    def train_step(self):
        config, warm = self.config, self.config.warm_start
        size = config.batch * config.accumulate
        regressing = self.step < warm.steps
        paired = 0 if self.pairs is None else size if regressing else size // 2 if warm.weight > 0 else 0
        rows, z, target = self.rows(size - paired), self.normal(size - paired), None
        self.drawn += size - paired
        if paired:
            chosen = torch.randint(0, warm.pairs, (paired,), generator=self.generator)
            rows, z = [self.pairs["rows"][i] for i in chosen] + rows, torch.cat([self.pairs["z"][chosen], z])
            target = self.pairs["x0"][chosen]
        condition, stats = self.encode([self.prompts[row] for row in rows]), {}
        x0 = self.student(z, condition)
        if regressing:
            stats["loss_student"] = loss = (x0 - target).square().mean()
        elif self.step >= warm.steps + warm.fake_steps:
            stats["loss_student"] = loss = self.distillation(x0, condition, paired, target)
        else:
            loss = None  # the fake model catches up first
        if loss is not None:
            stats["student_grad_norm"] = self.update("student", loss)
            follow = min(config.student.ema, (1 + self.step) / (10 + self.step))
            for name, value in self.angles["student"].items():
                self.average[name] = follow * self.average[name] + (1 - follow) * value.detach()
        for _ in range(0 if regressing else config.fake.updates):
            stats["loss_fake"] = loss = self.denoising(x0.detach(), condition)
            stats["fake_grad_norm"] = self.update("fake", loss)
        self.step += 1
        return {name: float(value.detach()) for name, value in stats.items()}

    def distillation(self, x0, condition, paired, target):
        config = self.config
        low, high = (round(fraction * T) for fraction in config.t_range)
        t, eps = torch.randint(low, high, (len(x0),), generator=self.generator), self.normal(len(x0))
        alpha, sigma = self.alpha_sigma(t)
        with torch.no_grad():
            x_t = alpha * x0 + sigma * eps
            x0_real, eps_real = self.guided(None, x_t, t, condition, config.guidance_scale)
            x0_fake, eps_fake = self.guided("fake", x_t, t, condition, config.fake.guidance_scale)
            g = sigma**2 * (eps_real - eps_fake)
            if config.objective == "dmd":
                g = (x0_fake - x0_real) / (x0 - x0_real).abs().mean((1, 2, 3), keepdim=True)
        loss = 0.5 * (x0 - (x0 - g).detach()).square().mean()
        return loss + config.warm_start.weight * (x0[:paired] - target).square().mean() if paired else loss

    def denoising(self, x0, condition):
        t = torch.randint(0, T, (len(x0),), generator=self.generator)
        dropped = torch.rand(len(x0), generator=self.generator) < self.config.fake.null_probability
        eps = self.normal(len(x0))
        condition = torch.where(dropped[:, None, None], self.encode([""]), condition)
        alpha, sigma = self.alpha_sigma(t)
        x0_fake, eps_fake = self.predict("fake", alpha * x0 + sigma * eps, t, condition)
        if self.config.fake.weighting == "alpha2":
            return (alpha * (eps_fake - eps)).square().mean()
        if self.predicts_v:
            return ((alpha * eps_fake - sigma * x0_fake) - (alpha * eps - sigma * x0)).square().mean()
        return (eps_fake - eps).square().mean()

    def update(self, role, loss):
        """One step of AdamW on the clipped gradient, by its formula; the norm before clipping."""
        config, angles = self.config, self.angles[role]
        gradients = torch.autograd.grad(loss, list(angles.values()), allow_unused=True, materialize_grads=True)
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        scale = min(1.0, config.clip / float(norm + 1e-6))
        lr = getattr(config, role).lr * min(1.0, (self.step + 1) / (config.lr_warmup + 1))
        if config.lr_schedule == "cosine":
            lr *= 0.1 + 0.45 * (1 + math.cos(math.pi * self.step / config.steps))
        self.updates[role] += 1
        one, two = config.betas
        with torch.no_grad():
            for (name, angle), gradient in zip(angles.items(), gradients, strict=True):
                first, second = self.moments[role][name]
                first.mul_(one).add_((1 - one) * scale * gradient)
                second.mul_(two).add_((1 - two) * (scale * gradient) ** 2)
                mean, square = first / (1 - one ** self.updates[role]), second / (1 - two ** self.updates[role])
                angle.mul_(1 - lr * config.weight_decay).sub_(lr * mean / (square.sqrt() + 1e-8))
        return norm


REPORTED = ("loss_student", "student_grad_norm", "loss_fake", "fake_grad_norm")

# --- the law ------------------------------------------------------------------------------------------------------------------

EVERYTHING = {
    "steps": 4, "batch": 2, "accumulate": 3, "guidance_scale": 2.5, "t_range": (0.35, 0.45), "clip": 0.02,
    "objective": "dmd", "betas": (0.5, 0.8), "weight_decay": 0.3, "lr_schedule": "cosine", "lr_warmup": 2,
    "student": {"rank": 3, "lr": 0.02, "timesteps": [700], "ema": 0.3},
    "fake": {"rank": 2, "lr": 0.03, "guidance_scale": 1.6, "updates": 2, "weighting": "none", "null_probability": 0.5},
    "warm_start": {"pairs": 5, "sampler_steps": 4, "guidance_scale": 3.5, "steps": 1, "fake_steps": 1, "weight": 0.7},
}  # fmt: skip
PAPER = {
    "steps": 3, "batch": 3, "guidance_scale": 1.5, "clip": 1e9,
    "student": {"rank": 3, "lr": 0.01, "timesteps": [999], "ema": 0.999},
    "fake": {"rank": 2, "lr": 0.02, "null_probability": 0.4},
    "warm_start": {"pairs": 3, "sampler_steps": 2, "guidance_scale": 1.0, "steps": 1, "fake_steps": 0, "weight": 0.0},
}  # fmt: skip


def follow(config, pipeline, monkeypatch):
    """A run of ``config`` and the reference beside it: ``(folder, reference, the reference's statistics)``."""
    start, plain = {}, loop.train_step

    def train_step(backbone, batch, timesteps, objective, settings, state):
        for role in ("student", "fake"):
            start.setdefault(role, {k: v.detach().clone() for k, v in roles.parameters(backbone.network, role).items()})
        return plain(backbone, batch, timesteps, objective, settings, state)

    monkeypatch.setattr(loop, "train_step", train_step)
    folder = distill(config)
    reference = Reference(pipeline, with_defaults(config), ["red apple", "blue car", "green tree", "yellow sun"], start)
    if config.warm_start.pairs:
        reference.make_pairs()
    return folder, reference, [reference.train_step() for _ in range(config.steps)]


def assert_moved_alike(found, expected, start, lr):
    """Angles agree to a part in a thousand of the distance that one step moves them.

    AdamW divides a gradient by its own size: where it is all rounding error, float32 and float64 part. That may happen to a
    few entries in a thousand, not more.
    """
    assert found.keys() == expected.keys()
    off = torch.cat([((found[k].double() - expected[k].detach()).abs() / lr).flatten() for k in expected])
    moved = torch.cat([((expected[k].detach() - start[k]).abs() / lr).flatten() for k in expected])
    assert moved.median() > 0.5
    share = float((off > 1e-3).float().mean())
    assert share < 5e-3, f"{share:.4f} of the entries differ, by up to {off.max():.2g} steps"


@pytest.fixture(params=["epsilon", "v_prediction"])
def teacher(request, sd_folder, sd_v_folder):
    return sd_folder if request.param == "epsilon" else sd_v_folder


@pytest.mark.parametrize("settings", [EVERYTHING, PAPER], ids=["everything", "paper"])
def test_the_loop_is_the_method(settings, teacher, prompts_path, tmp_path, monkeypatch):
    from wadi.backbones import load_pipeline

    config = tiny.settings(teacher, prompts_path, tmp_path / "run", **settings)
    pipeline = load_pipeline(teacher)
    folder, reference, expected = follow(config, pipeline, monkeypatch)

    # who is trained: every Linear of the blocks; of the fake model, those of attention and feed-forward
    linear = [name for name, layer in pipeline.unet.named_modules() if isinstance(layer, torch.nn.Linear) and "block" in name]
    layers = {role: {key.rsplit(".", 1)[0] for key in reference.angles[role]} for role in reference.angles}
    assert layers["student"] == set(linear)
    assert layers["fake"] == {name for name in linear if name.endswith(ATTENTION)}

    # what the steps report
    for line, stats in zip(stats_of(folder), expected, strict=True):
        reported = {name: line[name] for name in REPORTED if name in line}
        assert reported == pytest.approx(stats, rel=2e-4, abs=1e-9), line["step"]

    # where they lead
    last, _ = checkpoint_folders.latest(folder / "checkpoints")
    ema = {k.removeprefix("ema."): v for k, v in load_file(last / "training.safetensors").items() if k.startswith("ema.")}
    for role, tensors, wanted in (
        ("student", load_file(last / "student" / roles.WEIGHTS), reference.angles["student"]),
        ("fake", load_file(last / "fake" / roles.WEIGHTS), reference.angles["fake"]),
        ("student", ema, reference.average),
    ):
        named = {key.removeprefix("base_model.model."): value for key, value in tensors.items()}
        zero = {key: torch.zeros_like(value) for key, value in wanted.items()}
        assert_moved_alike(named, wanted, zero, getattr(config, role).lr)


def test_warm_start_pairs_are_the_teachers_samples_of_their_own_seed_prompt_and_guidance(
    teacher, prompts_path, tmp_path, monkeypatch
):
    from wadi.backbones import load_pipeline

    config = tiny.settings(teacher, prompts_path, tmp_path / "run", **{**EVERYTHING, "steps": 1})
    folder, reference, _ = follow(config, load_pipeline(teacher), monkeypatch)
    stored = load_file(folder / "warm_start.safetensors")
    assert stored["rows"].tolist() == reference.pairs["rows"]
    assert_close(stored["z"].double(), reference.pairs["z"])
    assert_close(stored["x0"].double(), reference.pairs["x0"], rtol=1e-3, atol=1e-4)
