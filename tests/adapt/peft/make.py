#!/usr/bin/env python3
"""Makes the references of tests/adapt/peft: a tiny OPT, an adapter to it as PEFT writes one, and what PEFT makes of them.

    tests/adapt/peft/make.py

`base` and `adapter` are folders of transformers and PEFT; `logits` are those of both together, and `trained` the adapter after
five steps of AdamW on one batch, in doubles. Needs Python with torch, transformers, peft.
"""
import json
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, OPTConfig, PreTrainedTokenizerFast

HERE = Path(__file__).parent
VOCAB = 24
STEPS, RATE, DECAY = 5, 1e-2, 0.1


def tokenizer():
    words = ["<s>", "<pad>", "</s>", "<unk>"] + [chr(ord("a") + i) for i in range(VOCAB - 4)]
    made = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    made.add_special_tokens(words[:4])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="</s>", eos_token="</s>", pad_token="<pad>")


def main():
    torch.manual_seed(3)
    config = OPTConfig(
        vocab_size=VOCAB, hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=16,
        max_position_embeddings=32, dropout=0.0, init_std=0.1,
    )
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(HERE / "base")
    tokenizer().save_pretrained(HERE / "base")
    lora = LoraConfig(r=2, lora_alpha=3, lora_dropout=0.0, target_modules=["q_proj", "fc1"], task_type="CAUSAL_LM")
    adapted = get_peft_model(model, lora)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(HERE / "adapter")
    written = json.loads((HERE / "adapter/adapter_config.json").read_text())
    written["base_model_name_or_path"] = "../base"
    (HERE / "adapter/adapter_config.json").write_text(json.dumps(written, indent=2) + "\n")
    (HERE / "adapter/README.md").unlink(missing_ok=True)

    base = AutoModelForCausalLM.from_pretrained(HERE / "base", dtype=torch.float64)
    adapted = PeftModel.from_pretrained(base, HERE / "adapter", is_trainable=True, autocast_adapter_dtype=False).double()
    rows = ["abcdefgh", "hgfedcba", "acegikmo", "tsrqponm"]
    # A text ends with the token that ends texts.
    tokens = torch.tensor([[ord(letter) - ord("a") + 4 for letter in row] + [2] for row in rows])
    (HERE / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    numbers = {"tokens": tokens.int(), "logits": adapted(tokens).logits.detach()}
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=DECAY)
    for step in range(STEPS):
        # The model's own loss is in single precision.
        logits = adapted(tokens).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        numbers[f"loss.{step}"] = loss.detach()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            numbers["trained." + name.replace(".default.", ".")] = parameter.detach()
    save_file({name: tensor.contiguous() for name, tensor in numbers.items()}, HERE / "numbers.safetensors")


if __name__ == "__main__":
    main()
