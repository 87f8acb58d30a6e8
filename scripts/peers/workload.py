"""What is measured: models, rows and pipelines, and how a process is timed. Python's standard library only."""
import json
import os
import signal
import subprocess
import time
from pathlib import Path

# Sizes as in `config` of a model document; both tie the head to the embedding.
MODELS = {
    "opt-125m": {
        "model": "opt",
        "config": {"vocab": 50272, "hidden": 768, "layers": 12, "heads": 12, "ffn": 3072, "max_positions": 2048},
    },
    "llama-15m": {
        "model": "llama",
        "config": {"vocab": 32000, "hidden": 288, "layers": 6, "heads": 6, "kv_heads": 6, "head_dim": 48, "ffn": 768,
                   "max_positions": 256, "tied": True},
    },
}
PAD, END = 1, 2

# Answers to prompts and nothing else: a stage that trains nobody.
GENERATE = """\
recipe: answers
models:
  actor: {type: causal_lm}
data:
  prompts: {fields: {prompt: text}, sequences: {prompt: [prompt]}, pad: left, width: 128, longer: drop}
graphs:
  counted:
    in:
      answer: bool[B, A]
    out:
      length: mean(sum(f32(answer), axis=1))
plan:
  - for: batch
    in: batches(prompts, 4)
    do:
      - rollout: generate(actor, batch.prompt, max_new_tokens=128, greedy=true)
      - told: counted(rollout)
"""

# Of every training on either side.
TRAINING = {
    "learning_rate": 1e-5, "lr_scheduler_type": "constant", "warmup_steps": 0, "weight_decay": 0.0,
    "max_grad_norm": 1.0, "adam_betas": [0.9, 0.95], "logging_steps": 1, "num_epochs": 1, "save": [],
}


def words(row, count, vocab):
    """A row of words that stand for tokens: `w17` is the token 17. No word is padding or another special token."""
    return [f"w{5 + (row * 7919 + i * 104729) % (vocab - 5)}" for i in range(count)]


def rows(kind, batch, length, steps, vocab):
    """Rows for so many steps of a kind of training, each of `length` tokens."""
    for row in range(batch * steps):
        text = words(row, length, vocab)
        half = length // 2
        if kind == "sft":
            yield {"text": " ".join(text)}
        elif kind == "reward":
            other = words(row + 100003, half, vocab)
            yield {"prompt": " ".join(text[:half]), "chosen": " ".join(text[half:]), "rejected": " ".join(other)}
        else:
            yield {"prompt": " ".join(text[:half])}


def write_tokenizer(folder, vocab, end):
    """A tokenizer whose words are numbers. Without an end token, answers have their full length."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": {f"w{i}": i for i in range(vocab)}, "unk_token": "w3"},
    }
    special = {"pad_token": f"w{PAD}", **({"eos_token": f"w{END}"} if end else {})}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(special))


def stage(kind, batch, length, bf16):
    """The stage of a pipeline, as its settings."""
    settings = dict(TRAINING, data="rows", bf16=bf16, batch_size=batch, micro_batch_size=batch)
    if kind == "sft":
        return dict(settings, model="base", max_length=length)
    if kind == "reward":
        return dict(settings, reward="base", max_length=length)
    if kind == "ppo":
        both = {"actor": {"model": "base"}, "critic": {"model": "base"}}
        return dict(settings, **both, minibatch_size=batch, max_prompt_len=length // 2, max_new_tokens=length // 2,
                    greedy=True)
    if kind == "generate":
        own = {"recipe": "./answers.yaml", "actor": "base", "data": "rows", "micro_batch_size": batch}
        return dict(own, logging_steps=1, num_epochs=1, save=[], **({"bf16": True} if bf16 else {}))
    raise ValueError(kind)


def write_pipeline(folder, base, vocab, stages):
    """A pipeline in a new folder, whose stages begin with a model. JSON is YAML, so no writer of YAML is needed."""
    folder.mkdir(parents=True, exist_ok=True)
    # Texts that are trained on end with a token; here they are cut off before it, at their full length.
    write_tokenizer(folder / "tokenizer", vocab, end=not {"ppo", "generate"} >= set(stages))
    for settings in stages.values():
        if not settings.get("bf16"):
            settings.pop("bf16", None)
    pipeline = {
        "dsgc": 1, "output_dir": str(folder / "out"), "models": {"base": dict(base, tokenizer="tokenizer")},
        "data": {"rows": {"path": "rows.jsonl", "shuffle": "none", "separator": " "}}, "stages": stages,
    }
    (folder / "pipeline.yaml").write_text(json.dumps(pipeline, indent=1))
    (folder / "answers.yaml").write_text(GENERATE)
    return folder / "pipeline.yaml"


def write_rows(folder, all_rows):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in all_rows))


class Ran:
    """A process that has ended: seconds of the whole, seconds until a line that was waited for, most bytes in memory."""

    def __init__(self, command, threads, env=None, until=None, limit=1800):
        """Runs a command on so many cores, at most `limit` seconds."""
        cores = sorted(os.sched_getaffinity(0))[:threads]
        started = time.perf_counter()
        # Messages go where they may be read afterwards and never fill a pipe.
        with open(os.path.join(os.environ.get("TMPDIR", "/tmp"), f"dsgc-bench-{os.getpid()}.log"), "w+") as messages:
            child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=messages, text=True, env=env,
                                     preexec_fn=lambda: os.sched_setaffinity(0, cores))
            signal.signal(signal.SIGALRM, lambda *_: child.kill())
            signal.alarm(limit)
            self.until, self.out = None, []
            for line in child.stdout:
                if self.until is None and until is not None and until in line:
                    self.until = time.perf_counter() - started
                self.out.append(line)
            _, status, usage = os.wait4(child.pid, 0)
            signal.alarm(0)
            child.returncode = os.waitstatus_to_exitcode(status)
            self.seconds = time.perf_counter() - started
            self.code = child.returncode
            self.memory = usage.ru_maxrss * 1024
            messages.seek(0)
            self.messages = messages.read().strip()
        os.unlink(messages.name)

    @property
    def why(self):
        """What a process said that failed, in a line."""
        lines = [line.strip() for line in self.messages.splitlines() if line.strip()]
        errors = [line for line in lines if line.lower().startswith("error")]
        return (errors or lines[-1:] or [f"it ended with code {self.code}"])[0]


def ours(program, pipeline, threads):
    """Runs a pipeline of one stage; seconds of every step and its metrics. Raises RuntimeError with what dsgc says."""
    ran = Ran([str(program), "run", str(pipeline)], threads, until=" step 1/")
    if ran.code != 0:
        raise RuntimeError(ran.why)
    (name,) = json.loads(pipeline.read_text())["stages"]
    lines = (pipeline.parent / "out" / name / "metrics.jsonl").read_text().splitlines()
    steps = [line for line in map(json.loads, lines) if "tokens_per_second" in line]
    seconds = [line["tokens"] / line["tokens_per_second"] for line in steps]
    losses = [line.get("loss") for line in steps]
    return {"seconds": seconds, "losses": losses, "metrics": steps, "first_step": ran.until, "memory": ran.memory}


def report(program, pipeline, threads):
    """What `dsgc compile` says of a pipeline, with the seconds of the process."""
    ran = Ran([str(program), "compile", "--json", str(pipeline)], threads)
    if ran.code != 0:
        raise RuntimeError(ran.why)
    return json.loads("".join(ran.out)), ran.seconds


def machine(program):
    """Where and with what it is measured."""
    facts = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":", 1)[1].strip() for line in facts.splitlines() if line.startswith("model name")]
    run = lambda *command: subprocess.run(command, capture_output=True, text=True).stdout.strip()
    here = str(Path(__file__).parent)
    commit = run("git", "-C", here, "rev-parse", "--short", "HEAD")
    changed = run("git", "-C", here, "status", "--porcelain", "--untracked-files=no")
    return {
        "cpu": names[0] if names else None, "cores": len(os.sched_getaffinity(0)),
        "commit": commit + (" with changes" if changed else "") if commit else None,
        "dsgc": run(str(program), "--version"), "load_before": os.getloadavg()[0],
        "at": time.strftime("%Y-%m-%d %H:%M"),
    }
