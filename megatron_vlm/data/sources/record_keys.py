"""The meaning of every key of a record and of a turn: used, bookkeeping, refused, or told.

    {"id": 7, "system": "Be brief.", "source": "web", "score": 3, "conversations":
     [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Yes.", "weight": 0}]}

    used          id, conversations, from, value; system makes a system turn; weight 0 leaves the answer untrained
    bookkeeping   source: says where a record is from, and nothing of what is trained
    refused       such as tools: it would change what is trained, and cannot be followed here
    told          score: nobody knows it, so it is passed over, and counted once for the whole file

A key whose value is null, or an empty text, list or object, is not there: tables that were written as JSON have every
column in every record.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from megatron_vlm.data.sample import BadSample, Role

SYSTEM_KEYS = ("system", "system_prompt")
MEDIA_KEYS = frozenset({"image", "images", "video", "videos"})
TRAINED_KEYS = ("weight", "loss", "train", "training")  # of a turn; OpenAI's, Axolotl's and others' names of one thing
USED = frozenset({"id", "image", "images", "video", "videos", "conversations", "q", "a", "form", *SYSTEM_KEYS})
USED_OF_TURN = frozenset({"from", "value", *TRAINED_KEYS})
BOOKKEEPING = frozenset(
    "annotation_id answer_type author category created created_at data_source dataset dataset_id dataset_name date "
    "domain doc_id file_name filename fps frame_count hash height height_list idx image_height image_id image_num "
    "image_size image_width index lang language length license md5 meta metadata model model_id num_tokens num_turns "
    "original_id origin pair_id qid question_id question_type sample_id sha256 source split subset task task_type "
    "text_num timestamp title token_num topic turn_id type url uuid width width_list".split()
)  # of a turn as well

_MEDIA = "images are named in 'image' or 'images', videos in 'video' or 'videos'"
_TURNS = "what is said stands in 'conversations'"
_TRAINED = "of a turn of the assistant 'weight' or 'loss' says whether it is trained"
_OF_RECIPE = "the recipe's data section says it for all records"
_NO_PLACE = "there is no place for it in what is trained"
REFUSED: dict[str, str] = {
    **dict.fromkeys(("video_path", "video_id", "frames", "audio", "audios"), _MEDIA),
    **dict.fromkeys(("incontext_images", "video_start", "video_end"), _MEDIA),
    **dict.fromkeys(("messages", "history", "captions", "incontext_conversations", "chosen", "rejected"), _TURNS),
    **dict.fromkeys(("weight", "loss", "train", "loss_weight", "sample_weight", "loss_mask", "mask"), _TRAINED),
    **dict.fromkeys(("chat_template", "chat_template_kwargs", "enable_thinking"), _OF_RECIPE),
    **dict.fromkeys(("tools", "functions", "documents"), _NO_PLACE),
}
REFUSED_OF_TURN: dict[str, str] = {
    **dict.fromkeys(("image", "images", "video", "videos", "audio"), f"{_MEDIA} of the whole record"),
    **dict.fromkeys(("loss_weight", "loss_mask", "mask", "masked", "train_detail"), _TRAINED),
    **dict.fromkeys(("system", "role", "content"), "a turn has its role in 'from' and its text in 'value'"),
    **dict.fromkeys(("tools", "tool_calls", "function_call", "reasoning_content", "thinking"), _NO_PLACE),
}
NEUTRAL: dict[str, Any] = {  # values that ask for nothing: of tools as LLaMA-Factory's files say that there are none
    **dict.fromkeys(("tools", "functions"), "[]"),
    **dict.fromkeys(("weight", "loss", "train", "loss_weight", "sample_weight"), 1),
}
OTHER_NAMES = frozenset(  # of images; beside 'image' or 'video' they say once more what is there
    "image_file image_files image_path image_paths image_url image_urls img img_path imgs photo picture pictures "
    "image_list video_file video_url".split()
)
MOST_REMARKS = 20  # of one record: a record may have any number of keys


def given(record: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that are there, with their values."""
    return {key: value for key, value in record.items() if not (value is None or value in ("", [], {}))}


def check_record(
    record: Mapping[str, Any], origin: str, used: frozenset[str] = USED, refused: Mapping[str, str] = REFUSED
) -> Iterator[str]:
    """Yields what is to be told of a record's keys (`given`). Raises BadSample for one that is refused.

    Args:
        used, refused: the format's own tables; OTHER_NAMES are refused too, in a record without media.
    """
    if not MEDIA_KEYS & record.keys():
        refused = {**dict.fromkeys(OTHER_NAMES, _MEDIA), **refused}
    if "conversations" in record and (beside := {"q", "a"} & record.keys()):
        raise BadSample(f"{origin} has field {min(beside)!r} beside 'conversations'; one of the two is needed")
    return _check(record, used, refused, origin, "key")


def check_turn(
    turn: Mapping[str, Any],
    origin: str,
    used: frozenset[str] = USED_OF_TURN,
    refused: Mapping[str, str] = REFUSED_OF_TURN,
) -> Iterator[str]:
    """Same as `check_record`, for a turn's keys."""
    return _check(turn, used, refused, origin, "a turn's key")


def _check(
    keys: Mapping[str, Any], used: frozenset[str], refused: Mapping[str, str], origin: str, called: str
) -> Iterator[str]:
    for key in keys:
        if key in refused and keys[key] != NEUTRAL.get(key):
            raise BadSample(f"{origin} has field {key!r}, which is not read; {refused[key]}", "unread field")
    for key in keys:
        if key not in used and key not in BOOKKEEPING and key not in refused:
            yield f"{called} {key[:40]!r} is unknown and ignored"


def few(remarks: Iterable[str]) -> tuple[str, ...]:
    """Each once, and no more than MOST_REMARKS."""
    return tuple(dict.fromkeys(remarks))[:MOST_REMARKS]


def system_text(record: Mapping[str, Any], origin: str) -> str | None:
    """The system prompt that a record's keys (`given`) name. Raises BadSample for one that is no text, and for two."""
    found = {key: record[key] for key in SYSTEM_KEYS if key in record}
    for key, text in found.items():
        if not isinstance(text, str):
            raise BadSample(f"{origin} field {key!r} is {json.dumps(text)[:80]}; a string is needed")
    if len(set(found.values())) > 1:
        raise BadSample(f"{origin} has two different system prompts, in {' and '.join(map(repr, found))}; needs one")
    return next(iter(found.values()), None)


def is_trained(turn: Mapping[str, Any], role: Role, origin: str) -> bool:
    """Whether a turn's keys (`given`) let it be trained; an answer is unless they say otherwise.

    Raises:
        BadSample: a weight between or beyond 0 and 1, two keys that differ, or a turn that is no answer and is to be
            trained.
    """
    found = {key: turn[key] for key in TRAINED_KEYS if key in turn}
    for key, value in found.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise BadSample(
                f"{origin} field {key!r} is {json.dumps(value)[:80]}; 1 or true is needed, which trains the answer, or "
                "0 or false",
                "weight",
            )
        if value and role != "assistant":
            raise BadSample(
                f"{origin} field {key!r} is {json.dumps(value)}, and it is from the {role}; 0 or false is needed, or "
                "none: the assistant's turns alone are trained",
                "weight",
            )
    if len({bool(value) for value in found.values()}) > 1:
        raise BadSample(f"{origin} fields {', '.join(map(repr, found))} differ; one of them is needed", "weight")
    return all(found.values())
