"""One case on PyTorch's side, in a process of its own: `torch_side.py FACTS`, where FACTS is a JSON object.

Prints `first` as soon as the first step has ended, and a JSON object at the end: seconds and losses of steps, versions.
With `"kind": "model"` it writes a model of random weights as a Hugging Face folder instead.
"""
import json
import sys
import time
import types

import torch
import transformers

PAD = 1


def write_model(facts):
    """A model of these sizes with random weights, without an end token and without dropout."""
    config = facts["config"]
    torch.manual_seed(0)
    common = {"pad_token_id": PAD, "eos_token_id": None, "bos_token_id": None}
    if facts["model"] == "opt":
        built = transformers.OPTConfig(
            vocab_size=config["vocab"], hidden_size=config["hidden"], word_embed_proj_dim=config["hidden"],
            num_hidden_layers=config["layers"], num_attention_heads=config["heads"], ffn_dim=config["ffn"],
            max_position_embeddings=config["max_positions"], dropout=0.0, attention_dropout=0.0, **common)
    else:
        built = transformers.LlamaConfig(
            vocab_size=config["vocab"], hidden_size=config["hidden"], num_hidden_layers=config["layers"],
            num_attention_heads=config["heads"], num_key_value_heads=config["kv_heads"],
            intermediate_size=config["ffn"], max_position_embeddings=config["max_positions"],
            tie_word_embeddings=config["tied"], **common)
    transformers.AutoModelForCausalLM.from_config(built).save_pretrained(facts["folder"])


def tokens(text):
    return [int(word[1:]) for word in text.split()]


class Trained:
    """A model with its optimizer. Weights in bf16 have a copy in single precision that the optimizer works on."""

    def __init__(self, module, facts):
        self.module = module.train()
        self.weights = [w for w in module.parameters() if w.requires_grad]
        low = any(w.dtype != torch.float32 for w in self.weights)
        self.masters = [w.detach().float().requires_grad_() for w in self.weights] if low else self.weights
        training = facts["training"]
        self.most = training["max_grad_norm"]
        self.optimizer = torch.optim.AdamW(
            self.masters, lr=training["learning_rate"], betas=tuple(training["adam_betas"]),
            weight_decay=training["weight_decay"], fused=True)

    def backward(self, loss):
        loss.backward()

    def step(self):
        copied = self.masters is not self.weights
        if copied:
            for master, weight in zip(self.masters, self.weights):
                master.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self.masters, self.most)
        self.optimizer.step()
        if copied:
            with torch.no_grad():
                for master, weight in zip(self.masters, self.weights):
                    weight.copy_(master)
        self.optimizer.zero_grad(set_to_none=True)


class Engine:
    """What DeepSpeed-Chat's trainer asks of an engine, on a plain module."""

    def __init__(self, module, facts, trained):
        self.module = module
        self.trained = Trained(module, facts) if trained else None

    def __call__(self, *args, **named):
        return self.module(*args, **named)

    def forward_value(self, *args, **named):
        return self.module.forward_value(*args, **named)

    def train(self):
        self.module.train()

    def eval(self):
        self.module.eval()

    def backward(self, loss):
        loss.backward()

    def step(self):
        self.trained.step()


class Case:
    """A case that is set up: `step` takes the rows of a step and gives its loss."""

    def __init__(self, facts):
        self.facts, self.way = facts, facts["way"]
        self.dtype = torch.float32 if self.way in ("f32", "autocast") else torch.bfloat16
        getattr(self, facts["kind"])()

    def load(self, kind=transformers.AutoModelForCausalLM):
        return kind.from_pretrained(self.facts["folder"], dtype=self.dtype)

    def compiled(self, module):
        return torch.compile(module) if self.way == "compile" else module

    def lower(self):
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.way == "autocast")

    def sft(self):
        trained = Trained(self.load(), self.facts)
        model = self.compiled(trained.module)

        def step(rows):
            ids = torch.tensor([tokens(row["text"]) for row in rows])
            with self.lower():
                loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False).loss
            trained.backward(loss)
            trained.step()
            return loss.item()

        self.step = step

    def value_model(self):
        """DeepSpeed-Chat's model with a head of one value."""
        from dschat.utils.model.reward_model import RewardModel
        names = types.SimpleNamespace(pad_token_id=PAD)
        return RewardModel(self.load(transformers.AutoModel), names).to(self.dtype)

    def reward(self):
        trained = Trained(self.value_model(), self.facts)
        model = self.compiled(trained.module)

        def step(rows):
            pairs = [[tokens(row["prompt"]) + tokens(row[answer]) for row in rows] for answer in ("chosen", "rejected")]
            ids = torch.tensor(pairs[0] + pairs[1])
            with self.lower():
                loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)["loss"]
            trained.backward(loss)
            trained.step()
            return loss.item()

        self.step = step

    def generate(self):
        model = self.load().eval()
        new = self.facts["length"] // 2

        def step(rows):
            ids = torch.tensor([tokens(row["prompt"]) for row in rows])
            with torch.no_grad(), self.lower():
                model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False,
                               pad_token_id=PAD)

        self.step = step

    def ppo(self):
        from dschat.rlhf.ppo_trainer import DeepSpeedPPOTrainer

        class Words(types.SimpleNamespace):
            """The least of a tokenizer that the trainer asks for."""

            def __call__(self, *_, **__):
                return {"input_ids": [2]}

            def batch_decode(self, *_, **__):
                return [""]

        engines = {
            "actor": Engine(self.load(), self.facts, True), "ref": Engine(self.load().eval(), self.facts, False),
            "critic": Engine(self.value_model(), self.facts, True),
            "reward": Engine(self.value_model().eval(), self.facts, False),
        }
        settings = types.SimpleNamespace(
            max_answer_seq_len=self.facts["length"] // 2, end_of_conversation_token="", actor_zero_stage=0,
            compute_fp32_loss=False, print_answers=False, align_overflow=False, local_rank=-1, dtype="bf16")
        trainer = DeepSpeedPPOTrainer(types.SimpleNamespace(tokenizer=Words(pad_token_id=PAD), **engines), settings)

        def step(rows):
            ids = torch.tensor([tokens(row["prompt"]) for row in rows])
            with self.lower():
                experience = trainer.generate_experience(ids, torch.ones_like(ids), 0)
                actor_loss, _ = trainer.train_rlhf(experience)
            return actor_loss.item()

        self.step = step


def main():
    facts = json.loads(sys.argv[1])
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if facts["kind"] == "model":
        return write_model(facts)
    torch.set_num_threads(facts["threads"])
    sys.path[:0] = [facts["chat"]] if facts["chat"] else []
    with open(facts["rows"]) as file:
        rows = [json.loads(line) for line in file]
    case, seconds, losses = Case(facts), [], []
    for at in range(0, len(rows), facts["batch"]):
        started = time.perf_counter()
        losses.append(case.step(rows[at:at + facts["batch"]]))
        seconds.append(time.perf_counter() - started)
        if at == 0:
            print("first", flush=True)
    print(json.dumps({"seconds": seconds, "losses": losses, "torch": torch.__version__,
                      "transformers": transformers.__version__}))


main()
