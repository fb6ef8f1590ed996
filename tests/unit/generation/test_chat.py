"""A conversation: the model sees all turns and images so far, as one prompt would show them."""

import pytest

from megatron_vlm.errors import DataError
from megatron_vlm.generation.chat import Chat
from megatron_vlm.generation.prompts import Dialogue, read_prompt


def test_a_dialogue_is_read_as_turns_with_all_images(images):
    dialogue = Dialogue((([images[0], "What?"], "A circle."),), [images[1], images[2], "And <image> or <image>?"])
    sample, sources = read_prompt(dialogue, "<image>", 1)
    assert [(turn.role, turn.text) for turn in sample.turns] == [
        ("user", "<image>\nWhat?"),
        ("assistant", "A circle."),
        ("user", "And <image> or <image>?"),
    ]
    assert sources == images


def test_a_turn_is_answered_as_the_whole_conversation(pair, images):
    chat = Chat(pair.ours, max_new_tokens=6)
    first = chat.say([images[0], "What is this?"])
    assert first == pair.ours.generate([images[0], "What is this?"], max_new_tokens=6)
    second = chat.say("far")
    rounds = (([images[0], "What is this?"], first),)
    assert second == pair.ours.generate(Dialogue(rounds, "far"), max_new_tokens=6)
    assert second != pair.ours.generate("far", max_new_tokens=6)  # what forgetting would say
    assert second != pair.ours.generate(Dialogue((("What is this?", first),), "far"), max_new_tokens=6)
    third = chat.say([images[2], "near"])
    assert third == pair.ours.generate(Dialogue((*rounds, ("far", second)), [images[2], "near"]), max_new_tokens=6)


def test_dialogues_of_unequal_length_are_batched(pair, images):
    long = Dialogue((([images[0], "What?"], "red"), ("And?", "blue circle")), [images[1], "which?"])
    answers = pair.ours.generate([long, ["far"]], max_new_tokens=6)
    assert answers == [pair.ours.generate(long, max_new_tokens=6), pair.ours.generate("far", max_new_tokens=6)]


class Recorder:
    """An assistant that keeps the seeds it is given."""

    def __init__(self):
        self.seeds = []

    def generate(self, prompts, **options):
        self.seeds.append(options["seed"])
        return "yes"


def seeds_of(num_turns, **options):
    chat = Chat(recorder := Recorder(), **options)
    for _ in range(num_turns):
        chat.say("far")
    return recorder.seeds


def test_turns_draw_apart():
    """From one another, and from those of a conversation with the next seed; the same again with the same seed."""
    seeds = seeds_of(5, seed=1)
    assert seeds == seeds_of(5, seed=1) and len({*seeds, *seeds_of(5, seed=2), *seeds_of(5)}) == 15
    assert seeds[0] == 1  # as `generate` alone


def test_a_bad_turn_is_forgotten(pair, images):
    chat = Chat(pair.ours, max_new_tokens=4)
    with pytest.raises(DataError, match="gone.png"):
        chat.say(["gone.png", "What?"])
    with pytest.raises(DataError, match="image marker"):
        chat.say("Which <image>?")
    assert chat.rounds == () and chat.say("far") == pair.ours.generate("far", max_new_tokens=4)
