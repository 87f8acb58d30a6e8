"""Our programs beside PyTorch's, as users run them: `scripts/bench-peers` starts this.

Every round runs each side once, in a process of its own, one after the other: dsgc, PyTorch as installed, PyTorch with
MKL on AVX-512. A value is the median over the rounds of the median over a process's steps, without its first.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import workload
from workload import MODELS, Ran, ours, report, rows, stage, write_pipeline, write_rows

# Kind of work, model, rows of a batch, tokens of a row, bf16; wanted: theirs / ours over stock and over AVX-512.
CASES = {
    "sft-opt-f32": ("sft", "opt-125m", 4, 256, False, (2.4, 1.25)),
    "sft-opt-bf16": ("sft", "opt-125m", 4, 256, True, (1.35, 1.3)),
    "sft-llama-f32": ("sft", "llama-15m", 8, 256, False, (2.7, 1.6)),
    "sft-llama-bf16": ("sft", "llama-15m", 8, 256, True, (1.5, 1.5)),
    "reward-opt-f32": ("reward", "opt-125m", 4, 256, False, (2.5, 1.1)),
    "generate-opt-f32": ("generate", "opt-125m", 4, 256, False, (4.0, 2.0)),
    "generate-opt-bf16": ("generate", "opt-125m", 4, 256, True, (4.0, 2.0)),
    "ppo-opt-f32": ("ppo", "opt-125m", 4, 256, False, (3.4, 1.6)),
    "ppo-opt-bf16": ("ppo", "opt-125m", 4, 256, True, (2.2, 1.9)),
}
KINDS = {
    "sft": "SFT step", "reward": "reward-model step, pairs", "generate": "generation, half prompt, half answer",
    "ppo": "PPO iteration, half prompt, half answer",
}
# Cases whose processes also give peak memory (wanted: ours / theirs), and the time to the end of the first step.
MEMORY = {"sft-opt-f32": 0.7, "ppo-opt-f32": 0.8}
FIRST_STEP = {"sft-opt-f32": 15.0}
# Seconds that `dsgc compile` may take.
COMPILE = {
    "compile-opt": (0.3, "`dsgc compile`, three stages of OPT-125m"),
    "compile-llama": (2.0, "`dsgc compile`, SFT of a Llama of 96 layers"),
}
# Their ways to compute in bf16: weights in bf16 with masters in f32, autocast; one graph can be compiled too.
WAYS = {
    "sft": ["bf16", "autocast", "compile"], "reward": ["bf16", "autocast", "compile"],
    "generate": ["bf16", "autocast"], "ppo": ["bf16", "autocast"],
}
SIDES = ["stock", "avx512"]

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


def tell(text):
    print(text, file=sys.stderr, flush=True)


class Bench:
    def __init__(self, options):
        self.options, self.program = options, Path(options.dsgc).resolve()
        self.cache = Path(options.cache).resolve()
        self.place = tempfile.TemporaryDirectory(prefix="dsgc-bench-")
        self.folder = Path(self.place.name)
        # Half of the machine's speed on CPUs of AMD: MKL asks this function whether the CPU is Intel's.
        source, self.preload = self.folder / "intel.c", self.folder / "libintel.so"
        source.write_text("int mkl_serv_intel_cpu_true(void) { return 1; }\n")
        subprocess.run([os.environ.get("CC", "cc"), "-shared", "-fPIC", "-o", self.preload, source], check=True)
        self.versions = {}

    def theirs(self, facts, side="stock"):
        threads = self.options.threads
        env = dict(os.environ, OMP_NUM_THREADS=str(threads), HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false",
                   DS_ACCELERATOR="cpu", TORCHINDUCTOR_CACHE_DIR=str(self.folder / "inductor"))
        if side == "avx512":
            env["LD_PRELOAD"] = str(self.preload)
        chat = self.options.examples and str(Path(self.options.examples).resolve() / "applications/DeepSpeed-Chat")
        facts = dict(facts, threads=threads, chat=chat, training=workload.TRAINING)
        ran = Ran([sys.executable, str(HERE / "torch_side.py"), json.dumps(facts)], threads, env, until="first")
        if ran.code != 0:
            raise RuntimeError(ran.why)
        if facts["kind"] == "model":
            return None
        told = json.loads(ran.out[-1])
        self.versions = {name: told[name] for name in ("torch", "transformers")}
        return dict(told, first_step=ran.until, memory=ran.memory)

    def model(self, name):
        """The folder of a model with random weights, from which both sides start."""
        folder = self.cache / name
        if not (folder / "model.safetensors").exists():
            tell(f"writing {folder}")
            self.theirs({"kind": "model", "folder": str(folder), **MODELS[name]})
        return folder

    def case(self, name):
        kind, model, batch, length, bf16, wanted = CASES[name]
        what = f"{KINDS[kind]}, {model}, {batch} x {length}, {'bf16' if bf16 else 'f32'}"
        base, folder, steps = self.model(model), self.folder / name, self.options.steps
        vocab = MODELS[model]["config"]["vocab"]
        pipeline = write_pipeline(folder, {"path": str(base)}, vocab, {kind: stage(kind, batch, length, bf16)})
        write_rows(folder, rows(kind, batch, length, 1 + steps, vocab))
        facts = {"kind": kind, "folder": str(base), "rows": str(folder / "rows.jsonl")}
        facts.update(batch=batch, length=length)
        row = {"case": name, "what": what, "wanted": dict(zip(SIDES, wanted)), "rounds": [], "notes": {}}
        try:
            row["planned"] = report(self.program, pipeline, self.options.threads)[0][0]["memory"]["peak"]
        except RuntimeError as why:
            row["notes"]["ours"] = str(why)
        needs_chat = kind in ("reward", "ppo")
        if needs_chat and not self.options.examples:
            row["notes"].update({side: "needs DEEPSPEED_EXAMPLES" for side in SIDES})
        # Which of their ways is best on each side is found out once; only that one goes into the rounds.
        ways, sides = WAYS[kind] if bf16 else ["f32"], [side for side in SIDES if side not in row["notes"]]
        row["way"] = {side: self.best_way(row, facts, side, ways) for side in sides}
        for number in range(self.options.rounds):
            found = {"load": os.getloadavg()[0]}
            if "ours" not in row["notes"]:
                found["ours"] = self.attempt(row, "ours", lambda: ours(self.program, pipeline, self.options.threads))
            for side in SIDES:
                if side not in row["notes"]:
                    way = row["way"][side]
                    found[side] = self.attempt(row, side, lambda: self.theirs(dict(facts, way=way), side))
            row["rounds"].append(found)
            tell(f"{name} round {number + 1}: " + ", ".join(
                f"{side} {self.of_process(found[side]):.3f} s" for side in ["ours", *SIDES] if found.get(side)))
        self.finish(row)
        return row

    def best_way(self, row, facts, side, ways):
        if len(ways) == 1:
            return ways[0]
        times = {}
        for way in ways:
            try:
                times[way] = self.of_process(self.theirs(dict(facts, way=way), side))
            except RuntimeError as why:
                tell(f"{row['case']}: {side} {way} does not run: {why}")
        if not times:
            row["notes"][side] = "no way to compute in bf16 runs"
            return None
        row.setdefault("ways", {})[side] = times
        return min(times, key=times.get)

    def attempt(self, row, side, run):
        try:
            return run()
        except RuntimeError as why:
            row["notes"][side] = str(why)
            return None

    @staticmethod
    def of_process(found):
        """Seconds of a step: the first one touches memory for the first time, and compiles."""
        return statistics.median(found["seconds"][1:])

    def finish(self, row):
        """Medians over the rounds, ratios, and whether both sides computed the same."""
        def median(side, value):
            values = [value(found[side]) for found in row["rounds"] if found.get(side)]
            return statistics.median(values) if values else None

        row["seconds"] = {side: median(side, self.of_process) for side in ["ours", *SIDES]}
        for key in ("memory", "first_step"):
            row[key] = {side: median(side, lambda found: found[key]) for side in ["ours", *SIDES]}
        own = row["seconds"]["ours"]
        row["ratio"] = {side: row["seconds"][side] / own if own and row["seconds"][side] else None for side in SIDES}
        if row["case"].startswith("sft"):
            row["first_loss"] = {side: median(side, lambda found: found["losses"][0]) for side in ["ours", *SIDES]}
            both = [loss for loss in row["first_loss"].values() if loss is not None]
            if max(both, default=0.0) - min(both, default=0.0) > 0.01:
                row["notes"]["losses"] = f"the losses of the first step differ: {row['first_loss']}"

    def compile(self, name):
        """Seconds of `dsgc compile`; nobody else does such a thing."""
        wanted, what = COMPILE[name]
        folder = self.folder / name
        if name == "compile-opt":
            base = MODELS["opt-125m"]
            stages = {"sft": dict(stage("sft", 4, 256, False), save=["model"])}
            stages["reward"] = dict(stage("reward", 4, 256, False), reward="sft", save=["reward"])
            stages["ppo"] = dict(stage("ppo", 4, 256, False), actor={"model": "sft"}, critic={"model": "reward"})
        else:
            config = {"vocab": 32000, "hidden": 2048, "layers": 96, "heads": 16, "kv_heads": 16, "head_dim": 128,
                      "ffn": 5632}
            base = {"model": "llama", "config": config}
            stages = {"sft": stage("sft", 4, 256, False)}
        pipeline = write_pipeline(folder, base, base["config"]["vocab"], stages)
        # A row that has what every stage asks for.
        write_rows(folder, rows("reward", 1, 16, 1, 1000))
        row = {"case": name, "what": what, "wanted": wanted, "notes": {}}
        times = []
        for _ in range(self.options.rounds):
            try:
                times.append(report(self.program, pipeline, self.options.threads)[1])
            except RuntimeError as why:
                row["notes"]["ours"] = str(why)
                break
        row["seconds"] = {"ours": statistics.median(times) if times else None}
        return row


def number(x, unit=""):
    return "-" if x is None else f"{x:.3g}{unit}"


def table(document):
    """The rows as Markdown."""
    m = document["machine"]
    versions = [f"{name} {version}" for name, version in document["versions"].items()]
    lines = [
        ", ".join([m["cpu"] or "unknown CPU", f"{document['threads']} threads", f"commit {m['commit']}", *versions])
        + f"; median of {document['rounds']} rounds; load of the machine before: {m['load_before']:.2f}",
        "",
        "| work | dsgc | PyTorch | PyTorch, MKL on AVX-512 | over PyTorch (wanted) | over AVX-512 (wanted) |",
        "|---|---|---|---|---|---|",
    ]
    gib = 2 ** 30
    notes = []
    for row in document["rows"]:
        seconds = row["seconds"]
        notes += [f"{row['what']}: {who}: {note}" for who, note in row["notes"].items()]
        if row["case"] in COMPILE:
            lines.append(f"| {row['what']} | {number(seconds['ours'], ' s')} (wanted {row['wanted']} s) | | | | |")
            continue
        ways = {side: f" ({row['way'][side]})" if row["way"].get(side) not in (None, "f32") else "" for side in SIDES}
        cells = [row["what"], number(seconds["ours"], " s")]
        cells += [number(seconds[side], " s") + ways[side] for side in SIDES]
        cells += [f"{number(row['ratio'][side], 'x')} ({row['wanted'][side]}x)" for side in SIDES]
        lines.append("| " + " | ".join(cells) + " |")
        for key, wanted, what, scale, unit in (
            ("memory", MEMORY, "its peak memory, ours / theirs", gib, " GiB"),
            ("first_step", FIRST_STEP, "process start to end of its first step", 1, " s"),
        ):
            if row["case"] in wanted:
                values = {side: row[key][side] and row[key][side] / scale for side in ["ours", *SIDES]}
                own, cells = values["ours"], [what, number(values["ours"], unit)]
                if key == "memory" and row.get("planned"):
                    cells[-1] += f" (planned {number(row['planned'] / gib, unit)})"
                cells += [number(values[side], unit) for side in SIDES]
                for side in SIDES:
                    ratio = own and values[side] and (own / values[side] if key == "memory" else values[side] / own)
                    cells.append(f"{number(ratio, 'x')} ({wanted[row['case']]}x)")
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines + [""] + notes)


def main():
    parser = argparse.ArgumentParser(prog="bench-peers", description="Our programs beside PyTorch's, interleaved.")
    names = [*CASES, *COMPILE]
    models = os.environ.get("BENCH_CACHE", str(ROOT / "target/bench-peers/models"))
    chat = os.environ.get("DEEPSPEED_EXAMPLES")
    parser.add_argument("cases", nargs="*", metavar="CASE", help="all of them unless given: " + " ".join(names))
    parser.add_argument("--json", action="store_true", help="print JSON with every number, not a Markdown table")
    parser.add_argument("--rounds", type=int, default=5, help="how often each side runs")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a process, after the first")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--dsgc", default=str(ROOT / "target/release/dsgc"), help="our program")
    parser.add_argument("--cache", default=models, help="where models of random weights are kept")
    parser.add_argument("--examples", default=chat, help="a checkout of DeepSpeedExamples")
    options = parser.parse_args()
    if unknown := [case for case in options.cases if case not in names]:
        parser.error(f"unknown case `{unknown[0]}`; cases are {' '.join(names)}")
    if options.rounds < 1 or options.steps < 1:
        parser.error("rounds and steps are at least 1")
    bench = Bench(options)
    document = {"machine": workload.machine(bench.program), "threads": options.threads, "rounds": options.rounds,
                "steps": options.steps, "rows": []}
    for name in options.cases or names:
        try:
            document["rows"].append(bench.case(name) if name in CASES else bench.compile(name))
        except RuntimeError as why:
            sys.exit(f"error: {name}: {why}")
        document["versions"] = bench.versions
    print(json.dumps(document, indent=1) if options.json else table(document))


main()
