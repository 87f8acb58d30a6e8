#!/usr/bin/env python3
"""Writes pairs.train.jsonl and pairs.eval.jsonl beside this file: word problems of GSM8K, each with a right and a wrong
solution of a model.

    python3 make_pairs.py example_model_solutions.jsonl

The solutions were graded by the authors of GSM8K (Cobbe et al. 2021); README.md says where the file is. The marks of
their calculator, `<<1+1=2>>`, are taken out. Every ninth problem is held out. Standard library only.
"""

import json
import pathlib
import re
import sys


def pairs(problem):
    graded = [value for value in problem.values() if isinstance(value, dict)]
    texts = {right: [g["solution"] for g in graded if g["is_correct"] is right] for right in (True, False)}
    question = problem["question"].strip()
    for chosen, rejected in zip(texts[True], texts[False]):
        clean = [re.sub(r"<<[^>]*>>", "", text).strip() for text in (chosen, rejected)]
        yield {"prompt": f"Human: {question} Assistant:", "chosen": clean[0], "rejected": clean[1]}


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    lines = pathlib.Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()
    folder = pathlib.Path(__file__).parent
    for name, held in (("train", False), ("eval", True)):
        rows = [row for i, line in enumerate(lines) if (i % 9 == 8) is held for row in pairs(json.loads(line))]
        with (folder / f"pairs.{name}.jsonl").open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        print(f"pairs.{name}.jsonl: {len(rows)} pairs")


if __name__ == "__main__":
    main()
