"""The quickstart's data: real handwritten digits as images, questions about them in LLaVA's JSON, and a tokenizer.

    python examples/quickstart/make_data.py runs/quickstart/data

Writes images/*.png (scikit-learn's 1,797 digits, 28x28 RGB), train.json, eval_digit.json, eval_parity.json,
eval_pair.json and tokenizer/. The split is by image, so no held-out digit is seen in training, in any question.
Everything follows from fixed seeds: the same files on every machine.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from megatron_vlm.data.text.new_tokenizer import train_tokenizer

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGIT_QUESTION = "What digit is this?"
PARITY_QUESTION = "Is this digit even or odd?"
PAIR_QUESTION = "Which image shows the larger digit, the first or the second?"
NUM_TRAIN_IMAGES = 1437
NUM_HELD_OUT_PAIRS = 720
IMAGE_PIXELS = 28  # a side
# Questions per training image: the mix is 4 digit : 2 parity : 4 pair, every one of the pairs another.
DIGIT_REPEATS, PARITY_REPEATS, PAIRS_PER_IMAGE = 4, 2, 4
VOCABULARY_SIZE = 354  # at most; 256 bytes, 3 special tokens, the rest merges


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where the files go")
    arguments = parser.parse_args()
    make_data(arguments.directory)
    for path in sorted(arguments.directory.iterdir()):
        print(path)


def make_data(directory: Path) -> None:
    """Writes images, conversations and tokenizer under `directory`; what is there already is overwritten."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    labels: list[int] = digits.target.tolist()
    write_images(digits.images, directory / "images")
    order = np.random.default_rng(0).permutation(len(labels)).tolist()
    train, held_out = order[:NUM_TRAIN_IMAGES], order[NUM_TRAIN_IMAGES:]
    files = {"train": training_samples(train, labels), **held_out_samples(held_out, labels)}
    for name, samples in files.items():
        (directory / f"{name}.json").write_text("[\n" + ",\n".join(map(json.dumps, samples)) + "\n]\n")
    texts = [turn["value"] for sample in files["train"] for turn in sample["conversations"]]
    train_tokenizer(sorted(set(texts)), VOCABULARY_SIZE, directory / "tokenizer")


def write_images(images: np.ndarray, directory: Path) -> None:
    """images [n, 8, 8] of 0..16 -> NNNN.png, 28x28 RGB, bicubic."""
    directory.mkdir(parents=True, exist_ok=True)
    for number, values in enumerate(images):
        small = Image.fromarray((values * (255 / 16)).round().astype(np.uint8))
        large = small.resize((IMAGE_PIXELS, IMAGE_PIXELS), Image.Resampling.BICUBIC)
        large.convert("RGB").save(directory / image_name(number))


def image_name(number: int) -> str:
    """An image's file name."""
    return f"{number:04d}.png"


def training_samples(numbers: list[int], labels: list[int]) -> list[dict[str, Any]]:
    """The training questions, each single-image one several times, so that one epoch has the mix wanted."""
    samples = [digit_sample(p, labels, f"-{copy}") for copy in range(DIGIT_REPEATS) for p in numbers]
    samples += [parity_sample(p, labels, f"-{copy}") for copy in range(PARITY_REPEATS) for p in numbers]
    pairs = choose_pairs(numbers, PAIRS_PER_IMAGE * len(numbers), seed=1)
    return samples + [pair_sample(first, second, labels) for first, second in pairs]


def held_out_samples(numbers: list[int], labels: list[int]) -> dict[str, list[dict[str, Any]]]:
    """The evaluation files by name: one question of each single-image form per image, and pairs."""
    pairs = choose_pairs(numbers, NUM_HELD_OUT_PAIRS, seed=2)
    return {
        "eval_digit": [digit_sample(number, labels) for number in numbers],
        "eval_parity": [parity_sample(number, labels) for number in numbers],
        "eval_pair": [pair_sample(first, second, labels) for first, second in pairs],
    }


def choose_pairs(numbers: list[int], count: int, seed: int) -> list[tuple[int, int]]:
    """`count` different ordered pairs of two different images."""
    random = np.random.default_rng(seed)
    pairs: dict[tuple[int, int], None] = {}
    while len(pairs) < count:
        first, second = (numbers[i] for i in random.choice(len(numbers), size=2, replace=False))
        pairs[first, second] = None
    return list(pairs)


def digit_sample(number: int, labels: list[int], suffix: str = "") -> dict[str, Any]:
    """A question about which digit one image shows."""
    return sample("digit", f"{number:04d}{suffix}", [number], DIGIT_QUESTION, NAMES[labels[number]])


def parity_sample(number: int, labels: list[int], suffix: str = "") -> dict[str, Any]:
    """Whether the digit is even or odd."""
    answer = "odd" if labels[number] % 2 else "even"
    return sample("parity", f"{number:04d}{suffix}", [number], PARITY_QUESTION, answer)


def pair_sample(first: int, second: int, labels: list[int]) -> dict[str, Any]:
    """A question about which of two images shows the larger digit."""
    difference = labels[first] - labels[second]
    answer = "the first" if difference > 0 else "the second" if difference < 0 else "they are equal"
    return sample("pair", f"{first:04d}-{second:04d}", [first, second], PAIR_QUESTION, answer)


def sample(form: str, name: str, numbers: list[int], question: str, answer: str) -> dict[str, Any]:
    """One conversation in LLaVA's form, with the form of its question."""
    paths = [f"images/{image_name(number)}" for number in numbers]
    return {
        "id": f"{form}-{name}",
        "form": form,
        "image": paths[0] if len(paths) == 1 else paths,
        "conversations": [
            {"from": "human", "value": "<image>\n" * len(paths) + question},
            {"from": "gpt", "value": answer},
        ],
    }


if __name__ == "__main__":
    main()
