"""The table of tasks. A task is a scorer: (answer, truth) -> 0.0 to 1.0; asking and gathering are the same for all."""

from collections.abc import Callable

from megatron_vlm.registry import Registry

Scorer = Callable[[str, str], float]
TASKS: Registry[Scorer] = Registry("evaluation task")


@TASKS.register("exact_match")
def exact_match(answer: str, truth: str) -> float:
    """1.0 where both are the same words, else 0.0; see `normalise`."""
    return float(normalise(answer) == normalise(truth))


def normalise(text: str) -> str:
    """Lower case, one blank between words, no full stop, exclamation or question mark at the end."""
    return " ".join(text.casefold().split()).rstrip(".!?").rstrip()
