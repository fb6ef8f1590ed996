"""The quickstart: a vision-language model learns to read handwritten digits on four parallel CPU ranks.

    make quickstart

1. makes the data: 1,797 real digits as images, questions about them in LLaVA's JSON, a tokenizer;
2. trains in two phases, tensor 2 x pipeline 2: everything, then all but the tower;
3. asks the checkpoint 1,440 questions about images it has never seen, with four data-parallel ranks, and asks them all
   again with the images blanked;
4. draws the loss curve and a contact sheet, and says how to ask it yourself.

Each step is a command that can be typed by hand, and is shown. Exits non-zero where the held-out answers are not as
good as promised. On a GPU:

    python examples/quickstart/run.py --ranks 1 runtime.device=cuda precision.params=bf16 \\
        parallel.tensor=1 parallel.pipeline=1 parallel.sequence=false
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
OUTPUT = Path("runs/quickstart")  # relative to the repository, as in the recipes
DATA, CHECKPOINT, RESULTS = OUTPUT / "data", OUTPUT / "phase2", OUTPUT / "evaluation"
PHASES = {"everything": "phase1", "the tower frozen": "phase2"}
NUM_RANKS = 4
FORMS = ("digit", "parity", "pair")
HEADLINE_FORMS = ("digit", "parity")
HEADLINE_TARGET, FORM_TARGET = 0.95, 0.90
BLANK_MARGIN = 0.05  # a form may be at most this much above its most frequent answer when it sees nothing


def main() -> int:
    arguments = parse_arguments()
    overrides, launcher = arguments.overrides, torchrun(arguments.ranks)
    started = time.monotonic()
    step("Making the data", sys.executable, "examples/quickstart/make_data.py", str(DATA))
    for name, phase in PHASES.items():
        shutil.rmtree(ROOT / OUTPUT / phase, ignore_errors=True)  # an earlier quickstart's: training would refuse it
        recipe = f"examples/recipes/quickstart_{phase}.yaml"
        step(f"Training, {phase}: {name}", *launcher, "tools/train.py", recipe, *overrides)
    questions = [str(DATA / f"eval_{form}.json") for form in FORMS]
    options = ["--task", "exact_match", "--blank-images", "--max-new-tokens", "8", "--output", str(RESULTS)]
    evaluate = [*launcher, "tools/evaluate.py", str(CHECKPOINT), *options, "--data", *questions]
    step("Asking about held-out images, seen and blanked", *evaluate)
    draw()
    summary = json.loads((ROOT / RESULTS / "exact_match.json").read_text())
    failures = shortfalls(summary["forms"])
    say_results(summary["forms"], time.monotonic() - started)
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; nothing is needed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="section.key=value, of both training phases")
    parser.add_argument("--ranks", type=int, default=NUM_RANKS, help=f"default {NUM_RANKS}")
    return parser.parse_args(arguments)


def torchrun(num_ranks: int) -> list[str]:
    """One machine."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]


def step(title: str, *command: str) -> None:
    """Shows and runs one command in the repository; the quickstart ends with its exit code if it fails."""
    print(f"\n== {title}\n   {' '.join(command)}", flush=True)
    done = subprocess.run(command, cwd=ROOT, check=False)
    if done.returncode:
        sys.exit(done.returncode)


def draw() -> None:
    """loss.png and contact_sheet.png from the files the steps left behind."""
    from drawings import draw_contact_sheet, draw_loss

    phases = {f"{phase}, {name}": read_lines(OUTPUT / phase / "metrics.jsonl") for name, phase in PHASES.items()}
    draw_loss(phases, ROOT / OUTPUT / "loss.png")
    records = read_lines(RESULTS / "exact_match.jsonl")
    records.sort(key=lambda record: FORMS.index(record["form"]))
    draw_contact_sheet(records, ROOT / DATA, ROOT / OUTPUT / "contact_sheet.png")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """A file of JSON lines."""
    return [json.loads(line) for line in (ROOT / path).read_text(encoding="utf-8").splitlines()]


def headline(forms: dict[str, dict[str, Any]]) -> float:
    """The share of right answers over the questions of HEADLINE_FORMS together."""
    counts = [forms[form]["num_questions"] for form in HEADLINE_FORMS]
    right = sum(forms[form]["score"] * count for form, count in zip(HEADLINE_FORMS, counts, strict=True))
    return right / sum(counts)


def shortfalls(forms: dict[str, dict[str, Any]]) -> list[str]:
    """Lists the promises of the quickstart that were not kept; nothing, where all is well."""
    found = []
    if headline(forms) < HEADLINE_TARGET:
        found.append(f"held-out exact match: found {headline(forms):.1%}, needed {HEADLINE_TARGET:.0%}")
    for form in HEADLINE_FORMS:
        if forms[form]["score"] < FORM_TARGET:
            found.append(f"held-out {form} questions: found {forms[form]['score']:.1%}, needed {FORM_TARGET:.0%}")
    for name, form in forms.items():
        limit = form["baseline_score"] + BLANK_MARGIN
        if form["blank_score"] > limit:
            found.append(
                f"{name} questions with blanked images: found {form['blank_score']:.1%}, needed at most {limit:.1%}: "
                "the answers do not come from the images"
            )
    return found


def say_results(forms: dict[str, dict[str, Any]], seconds: float) -> None:
    """The last lines: what was made, how to ask, each form, and the headline."""
    print(f"\n== Done in {seconds / 60:.1f} minutes. In {OUTPUT}/:")
    print(f"   loss.png, contact_sheet.png, {RESULTS.name}/ (every question and answer), checkpoint {CHECKPOINT.name}/")
    image = read_lines(RESULTS / "exact_match.jsonl")[0]["images"][0]
    python = Path(sys.executable)
    shown = python.relative_to(ROOT) if python.is_relative_to(ROOT) else python
    print("\nask it:")
    print(f'   {shown} tools/generate.py {CHECKPOINT} --media {DATA / image} --prompt "What digit is this?"\n')
    for name, form in forms.items():
        print(
            f"{name}: {form['score']:.1%} of {form['num_questions']}; with blanked images {form['blank_score']:.1%}, "
            f"always '{form['baseline_answer']}' {form['baseline_score']:.1%}"
        )
    print(f"held-out exact match: {headline(forms):.1%}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
