#!/usr/bin/env python3
"""Runs pipeline.yaml with three seeds, and shows what each stage has done on the questions that no stage was trained on.

    python3 examples/rlhf/three_seeds.py [DSGC]

DSGC is the program, `target/release/dsgc` unless given. Prints a table, how the answers of the models before and after
PPO look as a whole, and some of them. Exit code 1 if a stage has not done what it is for. Standard library only.
"""

import collections
import json
import math
import pathlib
import statistics
import subprocess
import sys
import tempfile

from make_data import BAD

HERE = pathlib.Path(__file__).parent
SEEDS = [1, 2, 3]
# Nats per answer by which the trained model may have left the one before it.
KL_BOUND = 4.0


def evaluations(folder):
    """Metrics of the held-out rows, before and after a stage."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [{k[5:]: v for k, v in line.items() if k.startswith("eval/")} for line in lines]
    rows = [row for row in rows if row]
    return rows[0], rows[-1]


def wilson(share, n, z=1.96):
    """95 % interval of a share of n (Wilson 1927)."""
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return middle - half, middle + half


def answers(dsgc, model, prompts):
    """One answer to each prompt, drawn as PPO draws them."""
    all_answers = []
    for seed, prompt in enumerate(prompts):
        command = [dsgc, "generate", str(model), "--prompt", prompt, "--temperature", "1", "--seed", str(seed), "--max-new-tokens", "24"]
        all_answers.append(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())
    return all_answers


def look(name, texts):
    """What a set of answers is like."""
    words = [word for text in texts for word in text.split()]
    starts = {tuple(bad.split()[:2]) for bad in BAD}
    evasive = sum(tuple(text.split()[:2]) in starts for text in texts) / len(texts)
    common, times = collections.Counter(texts).most_common(1)[0]
    word, word_times = collections.Counter(words).most_common(1)[0]
    print(
        f"  {name:10} {len(words) / len(texts):4.1f} words each; {len(set(texts))} of {len(texts)} differ; evasive or rude {evasive:4.0%}; "
        f"commonest answer {times / len(texts):3.0%} ({common!r}), commonest word {word_times / len(words):3.0%} ({word!r})"
    )
    return evasive, len(words) / len(texts), len(set(texts)) / len(texts)


def main():
    dsgc = sys.argv[1] if len(sys.argv) > 1 else "target/release/dsgc"
    prompts = [json.loads(line)["prompt"] for line in (HERE / "data" / "eval.jsonl").read_text().splitlines()]
    good = True
    print("| seed | perplexity before, after SFT | pairs ranked right (95 %) | reward before PPO (spread over prompts) | after | KL per answer | words before, after |")
    print("|---|---|---|---|---|---|---|")
    looks = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in SEEDS:
            runs = pathlib.Path(folder) / str(seed)
            command = [dsgc, "run", str(HERE / "pipeline.yaml"), "--set", f"seed={seed}", "--set", f"output_dir={runs}"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            (sft0, sft), (_, rm), (ppo0, ppo) = (evaluations(runs / stage) for stage in ("sft", "reward", "ppo"))
            low, high = wilson(rm["accuracy"], len(prompts))
            before, after = (answers(dsgc, runs / model, prompts) for model in ("sft", "ppo/actor"))
            words = [statistics.mean(len(text.split()) for text in texts) for texts in (before, after)]
            print(
                f"| {seed} | {sft0['ppl']:.0f}, {sft['ppl']:.2f} | {rm['accuracy']:.3f} ({low:.3f} to {high:.3f}) | {ppo0['reward']:+.2f} ({ppo0['reward_std']:.2f}) "
                f"| {ppo['reward']:+.2f} ({ppo['reward_std']:.2f}) | {ppo['sequence_kl']:.2f} | {words[0]:.1f}, {words[1]:.1f} |",
                flush=True,
            )
            good &= sft["ppl"] < sft0["ppl"] / 10 and low > 0.5
            good &= ppo["reward"] - ppo0["reward"] > ppo0["reward_std"] and ppo["sequence_kl"] < KL_BOUND
            looks.append((seed, before, after))
    for seed, before, after in looks:
        print(f"answers to the {len(prompts)} held-out questions, seed {seed}")
        (evasive, length, _), (evasive_after, length_after, differ) = look("after SFT", before), look("after PPO", after)
        # Not longer, not all alike, and in the way that people like better.
        good &= evasive_after < evasive / 2 and length_after < 1.25 * length and differ > 0.8
    seed, before, after = looks[0]
    print(f"the first of them, seed {seed}: question | after SFT | after PPO")
    for prompt, a, b in list(zip(prompts, before, after))[:8]:
        question = prompt.removeprefix("Question: ").removesuffix("\nAnswer:")
        print(f"  {question} | {a} | {b}")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
