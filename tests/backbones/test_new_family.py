"""A family added by a user: registered from outside, checked by the same class as ours, distilled and exported like them."""

import re
from pathlib import Path

import aura_flow
import pytest
import small_pipelines
import torch
from torch import nn

from wadi.backbones import from_pipeline, load_pipeline
from wadi.distill.config import DistillConfig, FakeConfig, StudentConfig
from wadi.distill.loop import distill
from wadi.distill.plan.architecture import read_architecture
from wadi.distill.plan.plan import plan_run
from wadi.pipelines import generate, load
from wadi.testing import Conformance, Family


def make(folder):
    from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    words, _ = small_pipelines.t5()
    text = UMT5EncoderModel(UMT5Config(vocab_size=len(words), d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4))
    network = AuraFlowTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_mmdit_layers=1, num_single_dit_layers=1,
        attention_head_dim=8, num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=32, pos_embed_max_size=64,
    )  # fmt: skip
    pipeline = AuraFlowPipeline(
        tokenizer=words, text_encoder=text, vae=small_pipelines.autoencoder(), transformer=network,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    )  # fmt: skip
    return small_pipelines.readied(pipeline)


def adapted(name, module):
    return isinstance(module, nn.Linear) and not re.search(r"time_step|norm|pos_embed", name)


@pytest.fixture(scope="session")
def family(tmp_path_factory):
    return Family(
        make(tmp_path_factory.mktemp("aura")),
        adapted=adapted,
        last=1000,
        features=False,  # its blocks have other names
        fake=lambda name, module: adapted(name, module) and "_transformer_blocks." in name,
    )


class TestAuraFlow(Conformance):
    """See `Conformance`."""


def test_the_page_shows_this_file():
    page = (Path(__file__).parents[2] / "docs" / "add-a-family.md").read_text()
    code = Path(aura_flow.__file__).read_text().split('"""', 2)[2].strip()
    assert f"```python\n{code}\n```" in page


def test_it_is_planned_distilled_and_drawn_like_ours(family, tmp_path):
    teacher = tmp_path / "teacher"
    family.pipeline.save_pretrained(teacher)
    (tmp_path / "prompts.txt").write_text("red apple\nblue car\n")
    config = DistillConfig(
        teacher=str(teacher), prompts=str(tmp_path / "prompts.txt"), out=str(tmp_path / "run"), steps=2, batch=2, device="cpu",
        resolution=(24, 16), student=StudentConfig(rank=2), fake=FakeConfig(rank=2), teacher_steps=2, sample_seeds=2,
    )  # fmt: skip
    assert plan_run(config, read_architecture(str(teacher))).student.rank == 2
    run = distill(config)
    student = load.load(run)
    drawn = generate.generate_images(student, ["red apple"], [5]).images[0]
    assert drawn.size == (16, 24)
    student.save_pretrained(tmp_path / "exported")
    again = load_pipeline(tmp_path / "exported")
    assert from_pipeline(again).resolution == (24, 16)
    assert list(generate.generate_images(again, ["red apple"], [5]).images[0].getdata()) == list(drawn.getdata())
