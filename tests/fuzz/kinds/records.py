"""LLaVA's conversation files, and chats: JSON lists and lines, with images and videos; up to index, samples and
pixels."""

import base64
import json
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from megatron_vlm.config.schema import VideoConfig, VisionConfig
from megatron_vlm.data.index.building import BadSamplePolicy
from megatron_vlm.data.index.cache import open_index
from megatron_vlm.data.media.images import MediaReader
from megatron_vlm.data.media.store import MediaStore
from megatron_vlm.data.media.video.files import read_images
from megatron_vlm.data.media.video.sampling import with_frames
from megatron_vlm.data.sources import SOURCES
from megatron_vlm.data.text.conversation import ConversationEncoder
from megatron_vlm.data.text.tokenizer import load_tokenizer
from megatron_vlm.models.vision.survey import survey_tower
from tests.fuzz import hostile
from tests.fuzz.kind import Kind, Read
from tests.helpers.data.videos import make_folder, make_video
from tests.helpers.models.tiny import tiny_clip, tiny_dataset, tiny_tokenizer

MOST_TOKENS = 400


@dataclass(frozen=True)
class Base:
    """Good records, the media they name, and what reads them."""

    records: list[dict[str, Any]]
    media: dict[str, bytes]
    encoder: ConversationEncoder
    reader: MediaReader
    source: str = "llava_json"


def prepare(folder: Path) -> Base:
    records = json.loads(tiny_dataset(folder, 8).read_text())
    make_video(folder / "clips" / "a.mp4", 12)
    make_folder(folder / "clips" / "frames", 3)
    talk = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "red é 😀"}]
    records.append({"id": 9, "video": "clips/a.mp4", "conversations": talk})
    records.append({"id": None, "video": ["clips/frames"], "form": "x", "conversations": talk})
    media_spec = survey_tower(VisionConfig.model_validate({"config": tiny_clip()}), None).media_spec
    tokenizer = load_tokenizer(tiny_tokenizer(folder), "<image>")
    encoder = ConversationEncoder(tokenizer, "auto", "<image>", media_spec.tokens_per_image)
    media = {
        str(path.relative_to(folder)): path.read_bytes()
        for name in ("images", "clips")
        for path in (folder / name).rglob("*")
        if path.is_file()
    }
    return Base(records, media, encoder, MediaReader(media_spec, "pad"))


def prepare_chats(folder: Path) -> Base:
    """The same talks, with images beside them, in their parts, and inside the record."""
    base, chats = prepare(folder), []
    for number, record in enumerate(base.records):
        turns, images = record["conversations"], record.get("image", [])
        images = [images] if isinstance(images, str) else images
        if number % 3 == 0:
            chats.append({"id": number, "conversations": turns, "images": images, "videos": record.get("video")})
            continue
        parts: list[Any] = [{"type": "image", "image": name} for name in images]
        if number % 3 == 1:
            texts = [base64.b64encode(base.media[name]).decode() for name in images]
            parts = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{one}"}} for one in texts]
        parts += [{"type": "video", "video": name} for name in [record.get("video")] if isinstance(name, str)]
        parts.append({"type": "text", "text": "Which?"})
        asked, answered = {"role": "user", "content": parts}, {"role": "assistant", "content": "red é"}
        chats.append({"id": number, "messages": [asked, answered]})
    return replace(base, records=chats, source="messages")


def make(random: Random, base: Base, folder: Path) -> Read:
    records = random.sample(base.records, random.choice((1, 3, 6)))
    for name, data in base.media.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    path = folder / "train.json"
    if random.random() < 0.2:
        spoilt = folder / random.choice(list(base.media))
        if random.random() < 0.7:
            hostile.in_its_place(random, spoilt)
        else:
            spoilt.write_bytes(hostile.some_bytes(random, spoilt.read_bytes()))
        path.write_text(json.dumps(base.records))
    elif random.random() < 0.06:
        kinds = tuple(kind for kind in hostile.PLACES if kind != "sparse")  # indexing takes twice a file's own size
        hostile.in_its_place(random, path, kinds)
    elif random.random() < 0.5:
        path.write_bytes(hostile.json_bytes(random, records))
    else:
        lines = [json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogatepass") for record in records]
        number = random.randrange(len(lines))
        lines[number] = hostile.json_bytes(random, records[number]).replace(b"\n", b" ")
        path.write_bytes(random.choice((b"\n", b"\n", b"\r\n", b"\n\n", b" \n")).join(lines))
    skip = BadSamplePolicy(base.reader, MOST_TOKENS) if random.random() < 0.6 else None
    return lambda: _read(base, path, skip, folder)


def _read(base: Base, path: Path, skip: BadSamplePolicy | None, folder: Path) -> None:
    """As training does: the index, and then every sample and its pixels."""
    file, sampling = SOURCES.get(base.source)(path, "<image>"), VideoConfig(num_frames=4)
    store = MediaStore.of(file, None)
    index = open_index(file, base.encoder, store, folder / "spare", skip=skip, sampling=sampling)
    for number in range(len(index)):
        index.sample_id(number)
        sample = with_frames(file.sample(index.key(number)), index.frame_counts(number), "<image>")
        base.encoder.encode(sample)
        for image in sample.images:
            for _ in read_images(base.reader, [image], store, sample.id):
                pass


RECORDS = Kind("record", 800, prepare, make, may_read_outside=True)
CHATS = Kind("chat", 400, prepare_chats, make, may_read_outside=True)
