"""Places of the answers in a rendered conversation, and the part of each that the model says itself.

A template is a program, so what it puts around answers is found by rendering stand-ins in their places. Most
conversations have around theirs what a small one has (`Surroundings`), and are not rendered again to find it.

All places are characters of the rendered text.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from os.path import commonprefix

from megatron_vlm.data.sample import Turn
from megatron_vlm.data.text.borders import Tokens

STAND_IN = "\ue000{}\ue001"  # private-use characters, which no text holds
Render = Callable[[Sequence[Turn], bool], str]  # turns, and whether the model is to speak next


@dataclass(frozen=True)
class AnswerSpan:
    """An assistant turn: what the model says itself, from the end of its prompt through the answer to its end."""

    start: int
    answer_end: int
    turn_end: int

    def is_closed_by(self, token: tuple[int, int], text: str) -> bool:
        """Whether a token stands behind the answer, but for blanks that it takes with it."""
        start, end = token
        return start >= self.answer_end or end > self.answer_end and text[start : self.answer_end].isspace()


@dataclass(frozen=True)
class Surroundings:
    """The text of a template around an answer: what the model says before it, and what ends its turn."""

    before: str
    after: str

    def find(self, text: str, start: int, answer: str, to_end: bool) -> AnswerSpan | None:
        """The answer behind `start` with these around it, up to the text's end where that is asked for."""
        for said in _forms(answer):
            whole = self.before + said + self.after
            if self.after and text.startswith(whole, start) and (not to_end or start + len(whole) == len(text)):
                end = start + len(whole)
                return AnswerSpan(start, end - len(self.after), end)
        return None


def find_surroundings(render: Render) -> list[Surroundings]:
    """Finds a template's text around the answers of small conversations, the last one's first. Raises as `render`."""
    found = []
    for rounds in (1, 2):
        turns = [turn for n in range(rounds) for turn in (Turn("user", "?"), Turn("assistant", STAND_IN.format(n)))]
        text = render(turns, False)
        end = text.rpartition(STAND_IN.format(rounds - 1))[2]
        for number in range(rounds):
            prompt = render(turns[: 2 * number + 1], True)
            before, stand_in, after = text[len(prompt) :].partition(STAND_IN.format(number))
            if text.startswith(prompt) and stand_in:
                found.append(Surroundings(before, commonprefix([after, end])))
    return list(dict.fromkeys(found))


def recognise(
    text: str, starts: Sequence[int], answers: Sequence[str], known: Sequence[Surroundings]
) -> list[AnswerSpan] | None:
    """The answers that begin at known places, the last of which ends the text; None where one has others around it."""
    spans = []
    limits = [*starts[1:], len(text)]
    for number, (start, limit, answer) in enumerate(zip(starts, limits, answers, strict=True), start=1):
        tries = (around.find(text, start, answer, to_end=number == len(answers)) for around in known)
        span = next((one for one in tries if one is not None), None)
        if span is None or span.turn_end > limit:
            return None
        spans.append(span)
    return spans


def locate(text: str, starts: Sequence[int], turns: Sequence[Turn], render: Render) -> list[AnswerSpan] | None:
    """The answers that begin at known places, by rendering the turns again with stand-ins for them.

    None where the text is not the same with the answers in the stand-ins' places; a template may strip their ends, and
    of the last answer nothing but the end is looked at. Raises as `render`.
    """
    answers = [turn.text for turn in turns if turn.role == "assistant"]
    earlier, last = answers[: len(answers) - len(starts)], len(answers) - 1
    masked, number = [], 0
    for turn in turns:
        is_masked = turn.role == "assistant" and number >= len(earlier)
        masked.append(Turn(turn.role, STAND_IN.format(number)) if is_masked else turn)
        number += turn.role == "assistant"
    rest = render(masked, False)
    closing = rest.rpartition(STAND_IN.format(last))[2]
    spans: list[AnswerSpan] = []
    position = 0
    for number, start in enumerate(starts, start=len(earlier)):
        before, stand_in, rest = rest.partition(STAND_IN.format(number))
        after = rest.partition(STAND_IN.format(number + 1))[0]
        if not stand_in:
            return None
        if number == last:
            end = len(text) - len(after)
            if not text.endswith(after) or not text[position:end].rstrip().endswith(answers[number].strip()):
                return None
            spans.append(AnswerSpan(start, end, len(text)))
            break
        position += len(before)
        said = next((form for form in _forms(answers[number]) if text.startswith(form + after, position)), None)
        if said is None or not text.startswith(before, position - len(before)):
            return None
        end = position + len(said)
        spans.append(AnswerSpan(start, end, end + len(commonprefix([after, closing]))))
        position = end
    return spans


def marked_tokens(tokens: Tokens, trained: range, span: AnswerSpan, marks: Sequence[tuple[int, int]]) -> range | None:
    """The tokens of an answer that a template's own marks say, instead of those of the rule.

    Args:
        trained: by the rule.
        marks: those that share a character with the answer's turn, in order.

    Returns:
        As many as the rule has, or more at the end; empty where there are no marks, and None where they leave out any
        of these or begin before.
    """
    if not marks:
        return range(0)
    first = next((n for n in range(trained.start, len(tokens.ids)) if tokens.offsets[n][1] > marks[0][0]), None)
    has_gap = any(one[1] != following[0] for one, following in zip(marks, marks[1:], strict=False))
    stop = trained.start
    while stop < len(tokens.ids) and tokens.offsets[stop][0] < marks[-1][1]:
        stop += 1
    if marks[0][0] < span.start or first != trained.start or has_gap or stop < trained.stop:
        return None
    return range(trained.start, stop)


def _forms(answer: str) -> Iterator[str]:
    """The forms of a text: as it is, and as templates strip it."""
    for blanks in (None, "\n"):
        yield answer
        yield answer.strip(blanks)
        yield answer.lstrip(blanks)
        yield answer.rstrip(blanks)
