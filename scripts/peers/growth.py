"""How an SFT step of OPT grows: one size at a time, the others as in `BASE`. `scripts/plot-growth` starts this."""
import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

import matplotlib

import workload

matplotlib.use("svg")
# Text stays text, and the same numbers give the same file.
matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "dsgc", "font.size": 9})
from matplotlib import pyplot  # noqa: E402

VOCAB = 4096
BASE = {"layers": 4, "width": 256, "tokens": 128, "batch": 4}
AXES = {
    "layers": [1, 2, 4, 8, 16, 32, 64],
    "width": [64, 128, 256, 512, 1024],
    "tokens": [32, 64, 128, 256, 512, 1024],
    "batch": [1, 2, 4, 8, 16, 32],
}
TITLES = {"layers": "layers", "width": "width", "tokens": "tokens of a row", "batch": "rows of a batch"}
HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


def measure(program, folder, sizes, steps, threads):
    """One point: seconds of a step and of compiling, bytes planned and measured."""
    width, tokens, batch = sizes["width"], sizes["tokens"], sizes["batch"]
    config = {"vocab": VOCAB, "hidden": width, "layers": sizes["layers"], "heads": width // 64, "ffn": 4 * width,
              "max_positions": max(AXES["tokens"])}
    stages = {"sft": workload.stage("sft", batch, tokens, bf16=False)}
    pipeline = workload.write_pipeline(folder, {"model": "opt", "config": config}, VOCAB, stages)
    workload.write_rows(folder, workload.rows("sft", batch, tokens, 1 + steps, VOCAB))
    compiled = [workload.report(program, pipeline, threads) for _ in range(3)]
    stage = compiled[0][0][0]
    ran = workload.ours(program, pipeline, threads)
    return dict(
        sizes, step_s=statistics.median(ran["seconds"][1:]), compile_s=min(seconds for _, seconds in compiled),
        planned_bytes=stage["memory"]["peak"], measured_bytes=ran["memory"], parameters=stage["parameters"],
        flops=stage["updates"][0]["flops_per_step"])


def plot(document, file):
    """A column per axis, a row per figure; a line that doubles with its axis has the slope of the grey one."""
    axes = list(document["axes"])
    figure, panels = pyplot.subplots(3, len(axes), figsize=(3 * len(axes), 7.2), squeeze=False, sharey="row",
                                    layout="constrained")
    for column, axis in enumerate(axes):
        points = document["axes"][axis]
        at = [point[axis] for point in points]
        lines = [
            ("step, s", [("step", [p["step_s"] for p in points])]),
            ("memory, MiB", [("measured", [p["measured_bytes"] / 2**20 for p in points]),
                             ("planned", [p["planned_bytes"] / 2**20 for p in points])]),
            ("compile, s", [("compile", [p["compile_s"] for p in points])]),
        ]
        for row, (label, series) in enumerate(lines):
            panel = panels[row][column]
            for name, values in series:
                panel.plot(at, values, marker="o", markersize=3, label=name)
            first = series[0][1][-1]
            panel.plot(at, [first * x / at[-1] for x in at], color="0.8", linewidth=0.8, zorder=0)
            panel.set_xscale("log", base=2)
            panel.set_yscale("log", base=2)
            panel.yaxis.set_major_formatter(lambda x, _: f"{x:g}")
            panel.set_xticks(at, [str(x) for x in at])
            panel.minorticks_off()
            panel.grid(alpha=0.3)
            if column == 0:
                panel.set_ylabel(label)
            if row == 2:
                panel.set_xlabel(TITLES[axis])
            if len(series) > 1:
                panel.legend(frameon=False)
    base = ", ".join(f"{count} {TITLES[axis]}" if axis != "width" else f"width {count}" for axis, count in BASE.items())
    machine = document["machine"]
    figure.suptitle(f"SFT of OPT, f32; where not varied: {base}, vocabulary of {VOCAB}\n"
                    f"{machine['cpu']}, {document['threads']} threads, commit {machine['commit']}; "
                    "grey: in proportion", fontsize=9)
    figure.savefig(file, metadata={"Date": None})


def main():
    parser = argparse.ArgumentParser(prog="plot-growth", description=__doc__.splitlines()[0])
    parser.add_argument("axes", nargs="*", metavar="AXIS", help="all of them unless given: " + " ".join(AXES))
    parser.add_argument("--steps", type=int, default=5, help="timed steps of a point, after the first")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--most", type=int, default=None, help="leave out sizes over this one")
    parser.add_argument("--out", default=str(ROOT / "docs/measurements"))
    parser.add_argument("--dsgc", default=str(ROOT / "target/release/dsgc"), help="our program")
    options = parser.parse_args()
    unknown = [axis for axis in options.axes if axis not in AXES]
    if unknown or options.steps < 1:
        parser.error(f"unknown axis `{unknown[0]}`; axes are {' '.join(AXES)}" if unknown else "steps are at least 1")
    program, out = Path(options.dsgc).resolve(), Path(options.out)
    document = {"machine": workload.machine(program), "threads": options.threads, "base": BASE, "axes": {}}
    with tempfile.TemporaryDirectory(prefix="dsgc-growth-") as folder:
        for axis in options.axes or AXES:
            document["axes"][axis] = []
            for count in AXES[axis]:
                if options.most is not None and count > options.most:
                    continue
                sizes, place = dict(BASE, **{axis: count}), Path(folder) / f"{axis}-{count}"
                point = measure(program, place, sizes, options.steps, options.threads)
                document["axes"][axis].append(point)
                memory, planned = point["measured_bytes"] >> 20, point["planned_bytes"] >> 20
                print(f"{axis} {count}: step {point['step_s']:.3f} s, memory {memory} MiB ({planned} planned), "
                      f"compile {point['compile_s']:.3f} s", file=sys.stderr, flush=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / "growth.json").write_text(json.dumps(document, indent=1) + "\n")
    plot(document, out / "growth.svg")
    print(f"wrote {out}/growth.json and growth.svg", file=sys.stderr)


main()
