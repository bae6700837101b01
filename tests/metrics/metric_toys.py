"""Small networks with random weights under the names that others' checkpoints use, written out in plain torch."""

import math
from collections import OrderedDict
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn


def pictures(count, height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, height, width), generator=generator, dtype=torch.uint8)


def shaken(module, seed=0):
    """Set all weights to random values, norms and biases too: a weight that starts at 0 or 1 could hide a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator) + (0.5 if parameter.ndim == 1 else 0))
    return module.eval()


class OpenClipBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        layers = [("c_fc", nn.Linear(width, 2 * width)), ("gelu", nn.GELU()), ("c_proj", nn.Linear(2 * width, width))]
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x, mask=None):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Resblocks(nn.Module):
    def __init__(self, width, heads, layers):
        super().__init__()
        self.resblocks = nn.ModuleList([OpenClipBlock(width, heads) for _ in range(layers)])

    def forward(self, x, mask=None):
        for block in self.resblocks:
            x = block(x, mask)
        return x


class OpenClipVisual(nn.Module):
    def __init__(self, width, heads, layers, patch, size, out):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty((size // patch) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Resblocks(width, heads, layers)
        self.proj = nn.Parameter(torch.empty(width, out))

    def forward(self, x):
        x = self.conv1(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenClip(nn.Module):
    """CLIP as open_clip has it: fused projections in the attention, and the two last projections from the right."""

    def __init__(self, vocabulary, length, size=16, patch=8, wide=24, narrow=16, out=12):
        super().__init__()
        self.visual = OpenClipVisual(wide, 3, 2, patch, size, out)
        self.transformer = Resblocks(narrow, 2, 2)
        self.token_embedding = nn.Embedding(vocabulary, narrow)
        self.positional_embedding = nn.Parameter(torch.empty(length, narrow))
        self.ln_final = nn.LayerNorm(narrow)
        self.text_projection = nn.Parameter(torch.empty(narrow, out))
        self.logit_scale = nn.Parameter(torch.empty([]))
        self.register_buffer("attn_mask", torch.full((length, length), -torch.inf).triu(1))

    def encode_text(self, tokens):
        length = tokens.shape[1]
        x = self.token_embedding(tokens) + self.positional_embedding[:length]
        x = self.ln_final(self.transformer(x, self.attn_mask[:length, :length]))
        return x[torch.arange(len(x)), tokens.argmax(1)] @ self.text_projection

    def config(self):
        """The same sizes as transformers' ``CLIPConfig``."""
        from transformers import CLIPConfig

        vocabulary, narrow = self.token_embedding.weight.shape
        wide, out = self.visual.proj.shape
        patch = self.visual.conv1.kernel_size[0]
        shared = {"hidden_act": "gelu", "projection_dim": out, "num_hidden_layers": 2}
        return CLIPConfig(
            text_config={
                "hidden_size": narrow, "intermediate_size": 2 * narrow, "num_attention_heads": 2, "vocab_size": vocabulary,
                "max_position_embeddings": len(self.positional_embedding), "eos_token_id": vocabulary - 1,
                "bos_token_id": vocabulary - 2, **shared,
            },
            vision_config={
                "hidden_size": wide, "intermediate_size": 2 * wide, "num_attention_heads": 3, "patch_size": patch,
                "image_size": patch * math.isqrt(len(self.visual.positional_embedding) - 1), **shared,
            },
            projection_dim=out,
        )  # fmt: skip


def blip_state(vocabulary, length=40, wide=24, narrow=16, size=16, patch=8, seed=0):
    """Random weights with the names of ImageReward's checkpoint, including those that are not used."""
    shapes = {
        "visual_encoder.cls_token": (1, 1, wide),
        "visual_encoder.pos_embed": (1, (size // patch) ** 2 + 1, wide),
        "visual_encoder.patch_embed.proj.weight": (wide, 3, patch, patch),
        "visual_encoder.patch_embed.proj.bias": (wide,),
        "vision_proj.weight": (5, wide),
        "vision_proj.bias": (5,),
        "text_proj.weight": (5, narrow),
        "text_proj.bias": (5,),
        "text_encoder.embeddings.word_embeddings.weight": (vocabulary, narrow),
        "text_encoder.embeddings.position_embeddings.weight": (length, narrow),
    }

    def linear(name, out, into):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, into), (out,)

    def norm(name, width):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (width,), (width,)

    norm("visual_encoder.norm", wide)
    norm("text_encoder.embeddings.LayerNorm", narrow)
    for i in range(2):
        block = f"visual_encoder.blocks.{i}"
        norm(f"{block}.norm1", wide)
        norm(f"{block}.norm2", wide)
        linear(f"{block}.attn.qkv", 3 * wide, wide)
        linear(f"{block}.attn.proj", wide, wide)
        linear(f"{block}.mlp.fc1", 2 * wide, wide)
        linear(f"{block}.mlp.fc2", wide, 2 * wide)
        layer = f"text_encoder.encoder.layer.{i}"
        for attention, seen in (("attention", narrow), ("crossattention", wide)):
            linear(f"{layer}.{attention}.self.query", narrow, narrow)
            linear(f"{layer}.{attention}.self.key", narrow, seen)
            linear(f"{layer}.{attention}.self.value", narrow, seen)
            linear(f"{layer}.{attention}.output.dense", narrow, narrow)
            norm(f"{layer}.{attention}.output.LayerNorm", narrow)
        linear(f"{layer}.intermediate.dense", 2 * narrow, narrow)
        linear(f"{layer}.output.dense", narrow, 2 * narrow)
        norm(f"{layer}.output.LayerNorm", narrow)
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():  # norms around 1, and the rest such that prompts and images move the score
        spread = 1.0 if "embed" in name else 0.5
        gain = 1.0 if len(shape) == 1 and name.endswith("weight") else 0.0
        state[f"blip.{name}"] = gain + spread * torch.randn(shape, generator=generator)
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(length)[None]
    return state | {f"mlp.{name}": tensor for name, tensor in head_state(narrow, seed).items()}


def head_state(width, seed=0):
    sizes, generator = (width, 1024, 128, 64, 16, 1), torch.Generator().manual_seed(seed)
    state = {}
    for index, (into, out) in zip((0, 2, 4, 6, 7), pairwise(sizes), strict=True):
        state[f"layers.{index}.weight"] = torch.randn(out, into, generator=generator) / into**0.5
        state[f"layers.{index}.bias"] = torch.randn(out, generator=generator)
    return state


def head(state, x, prefix=""):
    for index in (0, 2, 4, 6, 7):
        x = F.linear(x, state[f"{prefix}layers.{index}.weight"], state[f"{prefix}layers.{index}.bias"])
    return x[:, 0]


def blip(state, pixels, tokens, mask, vision_heads, text_heads):
    """Last hidden state of the text encoder that sees the image, as BLIP's own code computes it, from its own names."""

    def linear(x, name):
        return F.linear(x, state[f"blip.{name}.weight"], state[f"blip.{name}.bias"])

    def norm(x, name, eps):
        return F.layer_norm(x, x.shape[-1:], state[f"blip.{name}.weight"], state[f"blip.{name}.bias"], eps)

    def attend(q, k, v, heads, bias=0):
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + bias).softmax(-1)
        return (weights @ v).transpose(1, 2).flatten(2)

    x = F.conv2d(
        pixels,
        state["blip.visual_encoder.patch_embed.proj.weight"],
        state["blip.visual_encoder.patch_embed.proj.bias"],
        stride=state["blip.visual_encoder.patch_embed.proj.weight"].shape[-1],
    )
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([state["blip.visual_encoder.cls_token"].expand(len(x), -1, -1), x], 1)
    x = x + state["blip.visual_encoder.pos_embed"]
    for i in range(2):
        block = f"visual_encoder.blocks.{i}"
        q, k, v = linear(norm(x, f"{block}.norm1", 1e-6), f"{block}.attn.qkv").chunk(3, -1)
        x = x + linear(attend(q, k, v, vision_heads), f"{block}.attn.proj")
        x = x + linear(F.gelu(linear(norm(x, f"{block}.norm2", 1e-6), f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
    seen = norm(x, "visual_encoder.norm", 1e-6)

    h = state["blip.text_encoder.embeddings.word_embeddings.weight"][tokens]
    h = h + state["blip.text_encoder.embeddings.position_embeddings.weight"][: tokens.shape[1]]
    h = norm(h, "text_encoder.embeddings.LayerNorm", 1e-12)
    hidden = torch.where(mask.bool(), 0.0, -torch.inf)[:, None, None, :]
    for i in range(2):
        layer = f"text_encoder.encoder.layer.{i}"
        for part, other, bias in (("attention", None, hidden), ("crossattention", seen, 0)):
            q, k, v = (
                linear(h if name == "query" or other is None else other, f"{layer}.{part}.self.{name}")
                for name in ("query", "key", "value")
            )
            h = norm(
                h + linear(attend(q, k, v, text_heads, bias), f"{layer}.{part}.output.dense"),
                f"{layer}.{part}.output.LayerNorm",
                1e-12,
            )
        inner = F.gelu(linear(h, f"{layer}.intermediate.dense"))
        h = norm(h + linear(inner, f"{layer}.output.dense"), f"{layer}.output.LayerNorm", 1e-12)
    return h


def bert_tokenizer(folder):
    """A WordPiece tokenizer over single letters, saved."""
    from transformers import BertTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
    return len(words)
