"""A conversation: the model sees all turns and images so far, as one prompt would show them."""

import pytest

from megatron_vlm.errors import DataError
from megatron_vlm.generation.chat import Chat
from megatron_vlm.generation.prompts import Dialogue, read_prompt


def test_a_dialogue_is_read_as_turns_with_all_images(pictures):
    dialogue = Dialogue((([pictures[0], "What?"], "A circle."),), [pictures[1], pictures[2], "And <image> or <image>?"])
    sample, images = read_prompt(dialogue, "<image>", 1)
    assert [(turn.role, turn.text) for turn in sample.turns] == [
        ("user", "<image>\nWhat?"),
        ("assistant", "A circle."),
        ("user", "And <image> or <image>?"),
    ]
    assert images == pictures


def test_a_turn_is_answered_as_the_whole_conversation(pair, pictures):
    chat = Chat(pair.ours, max_new_tokens=6)
    first = chat.say([pictures[0], "What is this?"])
    assert first == pair.ours.generate([pictures[0], "What is this?"], max_new_tokens=6)
    second = chat.say("far")
    rounds = (([pictures[0], "What is this?"], first),)
    assert second == pair.ours.generate(Dialogue(rounds, "far"), max_new_tokens=6)
    assert second != pair.ours.generate("far", max_new_tokens=6)  # what forgetting would say
    assert second != pair.ours.generate(Dialogue((("What is this?", first),), "far"), max_new_tokens=6)
    third = chat.say([pictures[2], "near"])
    assert third == pair.ours.generate(Dialogue((*rounds, ("far", second)), [pictures[2], "near"]), max_new_tokens=6)


def test_dialogues_of_unequal_length_are_batched(pair, pictures):
    long = Dialogue((([pictures[0], "What?"], "red"), ("And?", "blue circle")), [pictures[1], "which?"])
    answers = pair.ours.generate([long, ["far"]], max_new_tokens=6)
    assert answers == [pair.ours.generate(long, max_new_tokens=6), pair.ours.generate("far", max_new_tokens=6)]


def test_turns_draw_apart(pair):
    chat = Chat(pair.ours, max_new_tokens=1, temperature=30.0, seed=7)
    said = [chat.say("far") for _ in range(2)]
    chat.rounds = ()
    assert chat.say("far") == said[0]


def test_a_bad_turn_is_forgotten(pair, pictures):
    chat = Chat(pair.ours, max_new_tokens=4)
    with pytest.raises(DataError, match="gone.png"):
        chat.say(["gone.png", "What?"])
    with pytest.raises(DataError, match="image marker"):
        chat.say("Which <image>?")
    assert chat.rounds == () and chat.say("far") == pair.ours.generate("far", max_new_tokens=4)
