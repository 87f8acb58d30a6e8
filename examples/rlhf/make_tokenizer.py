#!/usr/bin/env python3
"""Trains the tokenizer in tokenizer/ on data/prefs.jsonl: byte-level BPE. Needs the Python package `tokenizers`."""

import json
import pathlib

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

here = pathlib.Path(__file__).parent
rows = [json.loads(line) for line in (here / "data" / "prefs.jsonl").read_text(encoding="utf-8").splitlines()]
texts = [f"{row['prompt']} {row[answer]}" for row in rows for answer in ("chosen", "rejected", "demo")]

tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
special = ["<s>", "<pad>", "</s>"]
tokenizer.train_from_iterator(
    texts,
    trainers.BpeTrainer(vocab_size=640, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False),
)
# Every text begins with the start token, as OPT's do.
tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])

folder = here / "tokenizer"
folder.mkdir(exist_ok=True)
tokenizer.save(str(folder / "tokenizer.json"))
config = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_max_length": 256,
    "bos_token": "<s>",
    "eos_token": "</s>",
    "pad_token": "<pad>",
    # How `dsgc chat` writes a conversation: as the rows are.
    "chat_template": "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}Question: {{ message.content }}\nAnswer:"
    "{% else %} {{ message.content }}{{ eos_token }}\n{% endif %}{% endfor %}",
}
(folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
lengths = [len(tokenizer.encode(text).ids) for text in texts]
print(f"{folder}: {tokenizer.get_vocab_size()} tokens; texts have {min(lengths)} to {max(lengths)}, {sum(lengths) / len(lengths):.1f} on average")
