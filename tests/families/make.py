#!/usr/bin/env python3
"""Makes the references of tests/families: tiny models of transformers with random weights, and their numbers in doubles.

    tests/families/make.py

Logits, loss and gradients of a batch padded on the right, and greedy answers to prompts padded on the left. transformers
computes softmax, norms and rotations in single precision whatever the model's is; here they are made to follow it.
Needs Python with torch, transformers, safetensors, tokenizers.
"""
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).parent
VOCAB, PAD, END = 48, 1, 2
FAMILIES = {
    # Three heads: slopes where their number is no power of two.
    "bloom": dict(vocab_size=VOCAB, hidden_size=12, n_layer=2, n_head=3),
    "mistral": dict(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4, max_position_embeddings=128, sliding_window=5, tie_word_embeddings=False,
    ),
    "ministral": dict(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=1, head_dim=4, max_position_embeddings=128, sliding_window=3, tie_word_embeddings=True,
        layer_types=["sliding_attention", "full_attention"],
    ),
}

plain_softmax = F.softmax
F.softmax = lambda x, dim=-1, dtype=None: plain_softmax(x, dim=dim)
torch.nn.functional.softmax = F.softmax


def norm(self, x):
    return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


def rotations(self, x, position_ids, *_, **__):
    width = self.config.head_dim
    theta = self.config.rope_parameters["rope_theta"]
    freq = torch.tensor([theta ** (-2 * i / width) for i in range(width // 2)], dtype=torch.float64)
    angles = position_ids[..., None].double() * freq
    both = torch.cat([angles, angles], -1)
    return both.cos(), both.sin()


def follow_precision(model):
    for module in model.modules():
        name = type(module).__name__
        if name.endswith("RMSNorm"):
            type(module).forward = norm
        if name.endswith("RotaryEmbedding"):
            type(module).forward = rotations


def make(family, settings):
    torch.manual_seed(7)
    config = AutoConfig.for_model(family, pad_token_id=PAD, bos_token_id=END, eos_token_id=END, **settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn_like(p) * 0.4 + (1.0 if "norm" in name and "weight" in name or "ln_f.weight" in name else 0.0))
    folder = HERE / family
    model.save_pretrained(folder)
    words = {f"w{i}": i for i in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w1", eos_token="w2", bos_token="w2").save_pretrained(folder)

    model = model.double().eval()
    follow_precision(model)
    ids = torch.randint(3, VOCAB, (4, 24))
    mask = torch.ones_like(ids)
    for row, length in enumerate([24, 17, 9, 20]):
        ids[row, length:], mask[row, length:] = PAD, 0
    labels = torch.where(mask == 1, ids, -100)
    labels[0, :5] = -100
    tensors = {"in.sft0.input_ids": ids, "in.sft0.attention_mask": mask, "in.sft0.labels": labels}
    logits = model(input_ids=ids, attention_mask=mask).logits
    loss = F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1), ignore_index=-100)
    loss.backward()
    tensors["fp64.forward.logits"] = logits.detach()
    grads = {name: p.grad for name, p in model.named_parameters()}
    tensors |= {f"fp64.sft.grad.{name}": grad for name, grad in grads.items()}

    # Where the answers' stage has a critic, which no test asks.
    tensors["fp64.rm.v_head"] = torch.zeros(1, config.hidden_size, dtype=torch.float64)
    prompt = torch.randint(3, VOCAB, (4, 48))
    seen = torch.ones_like(prompt)
    for row, length in enumerate([48, 31, 6, 40]):
        prompt[row, : 48 - length], seen[row, : 48 - length] = PAD, 0
    tensors |= {"in.ppo.prompt": prompt, "in.ppo.prompt_att_mask": seen}
    answer, gap = prompt, math.inf
    with torch.no_grad():
        for _ in range(24):
            places = {} if family == "bloom" else {"position_ids": (seen.cumsum(-1) - 1).clamp(min=0)}
            last = model(input_ids=answer, attention_mask=seen, use_cache=False, **places).logits[:, -1]
            best = last.topk(2).values
            gap = min(gap, (best[:, 0] - best[:, 1]).min().item())
            # An end token is one like the others here.
            answer = torch.cat([answer, last.argmax(-1)[:, None]], 1)
            seen = torch.cat([seen, torch.ones(4, 1, dtype=seen.dtype)], 1)
    total = math.sqrt(sum(g.pow(2).sum().item() for g in grads.values()))
    import transformers

    numbers = {
        "about": {"torch": torch.__version__, "transformers": transformers.__version__, "family": family, "pad_token_id": PAD, "num_padding_at_beginning": 0},
        "fp64": {
            "sft": {"loss": loss.item(), "grad_norm_total": total},
            "generate": {"tokens": answer.tolist(), "smallest_top1_top2_gap": gap},
        },
    }
    (HERE / f"{family}.json").write_text(json.dumps(numbers, indent=1) + "\n")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(HERE / f"{family}.safetensors"))
    print(family, loss.item(), gap)


for family, settings in FAMILIES.items():
    make(family, settings)
