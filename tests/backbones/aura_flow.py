"""AuraFlow, added from outside the package: the example of docs/add-a-family.md."""

from collections.abc import Sequence

from torch import Tensor

from wadi.backbones import Backbone, Condition, register_family

ATTENTION = r"attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
FEED_FORWARD = r"(ff|ff_context)\.(linear_1|linear_2|out_projection)"
IN_BLOCKS = rf"(joint|single)_transformer_blocks\.\d+\.({ATTENTION}|{FEED_FORWARD})"


class AuraFlow(Backbone):
    """A rectified flow whose network is fed ``t / 1000``, under a T5 text encoder."""

    student_targets = rf"{IN_BLOCKS}|context_embedder|proj_out"
    fake_targets = IN_BLOCKS

    def encode_with_gradient(self, prompts: Sequence[str]) -> Condition:
        embeds, *_ = self.pipeline.encode_prompt(list(prompts), do_classifier_free_guidance=False, **self.encode_defaults())
        return Condition({"prompt_embeds": embeds})

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        dtype, embeds = self.network.dtype, condition.tensors["prompt_embeds"]
        velocity = self.network(x_t.to(dtype), embeds.to(dtype), (t / 1000).to(dtype), return_dict=False)[0]
        return velocity.float()

    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeds": (256, self.network.config.joint_attention_dim)}


register_family("AuraFlowPipeline", AuraFlow)
