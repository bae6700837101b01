"""How guidance enters: one scale for the whole package; the family says what its pipeline makes of it."""

import json
import shutil

import aura_flow
import pytest
import test_aura_flow
from diffusers import AuraFlowPipeline, FluxTransformer2DModel

import tiny
from wadi.backbones import load_pipeline, register_family
from wadi.cli.main import main
from wadi.distill.loop import distill
from wadi.errors import WadiError
from wadi.evaluate.generators import Source
from wadi.pipelines.generate import Sampling, generate_images
from wadi.testing import Conformance, Family
from wadi.testing.conformance import PROMPTS


def renormalised(mixture, conditional):
    return mixture * (conditional.norm(dim=1, keepdim=True) / mixture.norm(dim=1, keepdim=True))


class OffsetPipeline(AuraFlowPipeline):
    """Counts guidance from 0, as Z-Image does, and renormalises the mixture, as QwenImage and Lumina2 do.

    Its call cuts prompts shorter than its ``encode_prompt`` does by default, as QwenImage's.
    """

    def __call__(self, prompt=None, guidance_scale=4.0, max_sequence_length=40, **call):
        def mix(module, args, output):
            unconditional, conditional = output[0].chunk(2)
            mixture = renormalised(conditional + guidance_scale * (conditional - unconditional), conditional)
            return (mixture.repeat(2, 1, 1, 1),)  # two equal halves stay what they are, whatever scale mixes them

        hook = self.transformer.register_forward_hook(mix) if guidance_scale > 0 else None
        try:
            scale = 2.0 if hook else 0.0
            return super().__call__(prompt=prompt, guidance_scale=scale, max_sequence_length=max_sequence_length, **call)
        finally:
            if hook:
                hook.remove()


class Offset(aura_flow.AuraFlow):
    """The family of `OffsetPipeline`."""

    def guided(self, conditional, unconditional, guidance_scale):
        return renormalised(super().guided(conditional, unconditional, guidance_scale), conditional)

    @classmethod
    def guidance_arguments(cls, guidance_scale):
        return {"guidance_scale": guidance_scale - 1}

    def condition_shapes(self):
        return {"prompt_embeds": (40, self.network.config.joint_attention_dim)}


register_family("OffsetPipeline", f"{__name__}:Offset")


@pytest.fixture(scope="module")
def family():
    pipeline = test_aura_flow.small_pipeline()
    return Family(OffsetPipeline(**pipeline.components), adapted=None, fake=None)


class TestOffset:
    """The laws that guidance and prompts enter; the others are those of AuraFlow itself."""

    test_one_step = Conformance.test_one_step_is_the_pipelines_own
    test_many_steps = Conformance.test_many_steps_with_guidance_are_the_pipelines_own
    test_formula = Conformance.test_many_steps_follow_an_independent_formula
    test_plain_call = Conformance.test_training_feeds_the_network_what_a_plain_call_does
    test_two_passes = Conformance.test_conditional_and_null_in_one_batch_are_two_passes


def test_the_scale_reaches_each_pipeline_as_it_takes_it(family):
    backbone = family.backbone()
    assert backbone.guided_call(3.0)["guidance_scale"] == 2.0
    assert backbone.guided_call(1.0)["guidance_scale"] == 0.0
    assert backbone.encode([" ".join(["red"] * 90)]).tensors["prompt_embeds"].shape[1] == 40


@pytest.fixture(scope="module")
def flux_run(folder_of, tmp_path_factory):
    folder = tmp_path_factory.mktemp("flux_run")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    return distill(tiny.settings(folder_of("flux"), folder / "prompts.txt", folder / "run", steps=1, resolution=[16, 16]))


@pytest.fixture
def received(monkeypatch):
    """``(rows, guidance inputs)`` of every pass through a FLUX network."""
    passes_run, forward = [], FluxTransformer2DModel.forward

    def noting(self, *args, **kwargs):
        passes_run.append((len(kwargs["hidden_states"]), set(kwargs["guidance"].tolist())))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(FluxTransformer2DModel, "forward", noting)
    return passes_run


@pytest.mark.parametrize(("given", "passes"), [((), 1), (("--guidance-scale", "2"), 2)])
def test_fluxs_network_gets_the_guidance_of_its_training_in_compare(flux_run, received, tmp_path, given, passes):
    out = str(tmp_path / "o.png")
    assert main(["generate", "a", "--run", str(flux_run), "--compare", "--teacher-steps", "3", "--out", out, *given]) == 0
    assert {scale for _, scales in received for scale in scales} == {3.5}
    assert len(received) == 2 + 3 * passes + 1  # warming up, the teacher, the student


def test_fluxs_network_gets_the_guidance_of_its_training_in_evaluation(flux_run, received):
    source = Source(str(flux_run), run=str(flux_run))
    assert (source.guidance(None, 3.0), source.guidance(2.0, 3.0)) == (1.0, 2.0)
    assert source.last_timestep() == 1000
    for scale, rows in ((1.0, 2), (2.0, 4)):
        teacher = source.many_steps(2, scale)
        received.clear()
        generate_images(teacher.open(), PROMPTS, [0, 1], Sampling(teacher.steps, teacher.guidance_scale))
        assert sum(count for count, _ in received) == 2 * rows
        assert {tuple(scales) for _, scales in received} == {(3.5,)}
    assert source.many_steps(2, 2.0).key != source.many_steps(2, 3.0).key
    # Not only the number: images of a network that received it as its input are never taken for these.
    assert source.many_steps(2, 2.0).about["arguments"] == {"true_cfg_scale": 2.0, "negative_prompt": ""}


@pytest.mark.parametrize(
    ("name", "last"), [("sd1", 999), ("pixart-sigma", 999), ("sd3", 1000), ("flux", 1000), ("sana", 1000), ("z-image", 1000)]
)
def test_the_teacher_forced_to_one_step_starts_at_its_last_timestep(folder_of, name, last):
    assert Source("x", pipeline=True, teacher=str(folder_of(name))).last_timestep() == last


def test_a_pipeline_that_no_family_serves_is_not_measured_at_a_guidance_of_its_own(folder_of, tmp_path):
    folder = tmp_path / "exported"
    shutil.copytree(folder_of("flux"), folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "FluxInpaintPipeline"}))
    source = Source(str(folder), pipeline=True)
    for steps, scale in ((1, None), (4, 3.0)):
        with pytest.raises(WadiError, match="FluxInpaintPipeline"):
            source.plain(steps, scale)
    pipeline = load_pipeline(folder_of("flux"))
    pipeline.__class__ = type("Unknown", (type(pipeline),), {})
    with pytest.raises(WadiError, match="Unknown"):
        generate_images(pipeline, ["a"], [0], Sampling(4, 3.0))


@pytest.mark.parametrize(("family", "scale"), [("flux", 1.0), ("sd1", 2.5)])
def test_the_teacher_of_analyze_has_its_familys_guidance(folder_of, tmp_path, monkeypatch, capsys, family, scale):
    def noted(source, steps, guidance_scale):
        raise WadiError(f"{steps} steps, guidance {guidance_scale}.")

    monkeypatch.setattr(Source, "many_steps", noted)
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    options = ["--swap-eval", "--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "out")]
    assert main(["analyze", str(folder_of(family)), str(folder_of(family)), *options]) == 2
    assert f"25 steps, guidance {scale}." in capsys.readouterr().err
