"""The stream of steps: the same global batches in every layout, every image read by one rank of its replica."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from megatron_vlm.config.schema import Config
from megatron_vlm.data.batch import StepBatch
from megatron_vlm.data.fetch import loader, shape
from megatron_vlm.data.fetch.loader import build_held_out_loader, build_loader, open_training_data, pinning
from megatron_vlm.data.media.images import FAULTS, MediaReader
from megatron_vlm.data.sample import IGNORE
from megatron_vlm.data.text.tokenizer import load_tokenizer
from megatron_vlm.errors import DataError
from megatron_vlm.models.description import describe_model
from megatron_vlm.models.vision.media_spec import MediaSpec
from megatron_vlm.parallel.sizes import GridSizes
from tests.helpers.faults import bad_media
from tests.helpers.models.described import described
from tests.helpers.models.tiny import tiny_dataset, tiny_recipe
from tests.unit.data.tokenizers import QWEN3

SPEC = MediaSpec(16, 16, 28, 28, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
ONE_RANK = GridSizes()
LAYOUTS = [
    ONE_RANK,
    GridSizes(data=2),
    GridSizes(tensor=2, pipeline=2),
    GridSizes(tensor=2, data=2),
    GridSizes(ulysses=2, ring=2, data=2),
    GridSizes(tensor=2, ulysses=2, data=2, pipeline=2),
]


def steps_of(
    config: Config, sizes: GridSizes = ONE_RANK, rank: int = 0, start: int = 0, count: int = 4
) -> list[StepBatch]:
    tokenizer = load_tokenizer(config.model.language.tokenizer, config.data.image_token)
    return list(build_loader(config, tokenizer, described(config, SPEC), sizes, rank, start, count))


def equal(first: Any, second: Any) -> bool:
    """Whether two results are the same, tensors and all."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(equal, first, second))
    return (
        equal(list(vars(first).items()), list(vars(second).items())) if hasattr(first, "__dict__") else first == second
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("loader")


def row_lengths(config: Config, sizes: GridSizes = ONE_RANK) -> list[tuple[int, int]]:
    """By step: tokens of its longest row, and of all of its rows with their padding."""
    return [(max(batch.row_tokens), batch.length) for batch in steps_of(config, sizes)]


def test_rows_are_padded_to_a_multiple(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = row_lengths(tiny_recipe(folder))
    assert all(length == longest for longest, length in plain)
    wide = row_lengths(tiny_recipe(folder, data={"pad_to_multiple_of": 24}))
    assert wide == [(longest, -(-longest // 24) * 24) for longest, _ in plain] and wide != plain
    cut = row_lengths(tiny_recipe(folder, data={"pad_to_multiple_of": 24}), GridSizes(ring=5))
    assert cut == [(longest, -(-length // 10) * 10) for longest, length in wide]
    most = max(longest for longest, _ in plain)  # of which no memory estimate knows more
    short = row_lengths(tiny_recipe(folder, data={"pad_to_multiple_of": 1000}, training={"sequence_length": most}))
    assert {length for _, length in short} == {most}
    monkeypatch.setattr(shape, "is_on_gpu", lambda: True)
    monkeypatch.setattr(loader, "pinning", lambda: None)
    assert row_lengths(tiny_recipe(folder)) == [(longest, -(-longest // 64) * 64) for longest, _ in plain]
    packed = {"packing": True, "pad_to_multiple_of": 24}
    assert {length for _, length in row_lengths(tiny_recipe(folder, data=packed))} == {128}


@pytest.mark.parametrize("data", [{}, {"group_by_modality_length": True}, {"packing": True}])
def test_an_epoch_has_as_many_rows_as_train_every_sample_once(folder: Path, data: dict[str, Any]) -> None:
    config = tiny_recipe(folder, data=data, training={"global_batch_size": 1})
    tokenizer = load_tokenizer(config.model.language.tokenizer, config.data.image_token)
    num_rows = open_training_data(config, tokenizer, described(config, SPEC), 0).plan.num_rows
    seen = [sample for step in steps_of(config, count=num_rows) for sample in step.sample_ids]
    assert len(seen) == len(set(seen)) == 24 and (num_rows < 24) == ("packing" in data)


@pytest.mark.parametrize("micro_batch_size", [1, 2])
@pytest.mark.parametrize("sizes", LAYOUTS)
def test_every_layout_has_the_same_global_batch(folder: Path, sizes: GridSizes, micro_batch_size: int) -> None:
    training = {"micro_batch_size": micro_batch_size}
    sequence = sizes.tensor > 1
    config = tiny_recipe(folder, training=training, parallel={"sequence": sequence})
    reference = steps_of(config)
    ranks = [steps_of(config, sizes, rank) for rank in range(sizes.world)]
    for step, whole in enumerate(reference):
        rows: dict[int, torch.Tensor] = {}
        for rank, batches in enumerate(ranks):
            batch, data_rank = batches[step], sizes.coordinates(rank).data
            assert (batch.step, batch.sample_ids) == (step, whole.sample_ids)
            assert (batch.num_tokens, batch.num_media) == (whole.num_tokens, whole.num_media)
            assert (
                batch.length >= whole.length and batch.length % (sizes.context * (sizes.tensor if sequence else 1)) == 0
            )
            assert batch.length == ranks[0][step].length
            for m, micro_batch in enumerate(batch.micro_batches):
                for i in range(micro_batch_size):
                    row = (m * sizes.data + data_rank) * micro_batch_size + i
                    assert micro_batch.sample_ids[i] == whole.sample_ids[row]
                    found = torch.stack([micro_batch.ids[i], micro_batch.labels[i], micro_batch.position_ids[i]])
                    assert torch.equal(rows.setdefault(row, found), found)
        assert sorted(rows) == list(range(8))
        for row, found in rows.items():
            expected = whole.micro_batches[row // micro_batch_size]
            i = row % micro_batch_size
            num_tokens = whole.row_tokens[row]  # what follows is padding, of which each micro-batch has its own
            for held in (found, torch.stack([expected.ids[i], expected.labels[i]])):
                assert (held[0, num_tokens:] == 0).all() and (held[1, num_tokens:] == -100).all()
            assert torch.equal(found[0, :num_tokens], expected.ids[i, :num_tokens])
            assert torch.equal(found[1, :num_tokens], expected.labels[i, :num_tokens])
        first_of_replica = [sizes.replica_ranks(d)[0] for d in range(sizes.data)]
        trained = sum(ranks[rank][step].num_trained_tokens_local for rank in first_of_replica)
        assert (
            trained == whole.num_trained_tokens_local == sum(int((b.labels != -100).sum()) for b in whole.micro_batches)
        )


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("sizes", LAYOUTS)
def test_each_image_is_read_by_one_rank_of_its_replica(folder: Path, sizes: GridSizes, window: int | None) -> None:
    config = tiny_recipe(folder, training={"media_window": window})
    reader = MediaReader(SPEC, "pad")
    ranks = [steps_of(config, sizes, rank) for rank in range(sizes.world)]
    for step in range(4):
        paths = []
        for data in range(sizes.data):
            replica = [ranks[rank][step] for rank in sizes.replica_ranks(data)]
            assert [w.micro_batches for w in replica[0].windows] == [w.micro_batches for w in replica[-1].windows]
            assert sum((list(w.micro_batches) for w in replica[0].windows), []) == list(
                range(len(replica[0].micro_batches))
            )
            for number, window_batch in enumerate(replica[0].windows):
                read = sorted(span.path for batch in replica for span in batch.windows[number].own_spans)
                assert read == sorted(span.path for span in window_batch.spans)
                paths += read
            for replica_rank, batch in enumerate(replica):
                for window_batch in batch.windows:
                    own = [window_batch.spans[i] for i in window_batch.plan.items_of(replica_rank)]
                    assert list(window_batch.own_spans) == own and window_batch.pixels.shape == (len(own), 3, 28, 28)
                    for span, pixels in zip(own, window_batch.pixels, strict=True):
                        assert torch.equal(pixels, reader.read(folder / span.path, "s"))
        assert len(paths) == len(set(paths)) == ranks[0][step].num_media


def test_placeholders_are_where_the_spans_say(folder: Path) -> None:
    config = tiny_recipe(folder, training={"micro_batch_size": 2})
    tokenizer = load_tokenizer(config.model.language.tokenizer, "<image>")
    for batch in steps_of(config):
        for window in batch.windows:
            for span in window.spans:
                m = batch.micro_batches[span.item.micro_batch]
                at = slice(span.item.start, span.item.start + span.item.num_tokens)
                assert m.sample_ids[span.item.row] == span.sample_id
                assert (m.ids[span.item.row, at] == 0).all() and (
                    m.labels[span.item.row, at.start - 1 : at.stop - 1] == -100
                ).all()
                assert tokenizer.decode(m.ids[span.item.row, at.stop :]).startswith("\n")


def test_resume_is_exact_and_workers_change_nothing(folder: Path) -> None:
    """Also over the end of an epoch, which comes after three steps."""
    plain = steps_of(tiny_recipe(folder), count=5)
    assert equal(plain[2:], steps_of(tiny_recipe(folder), start=2, count=3))
    assert equal(plain, steps_of(tiny_recipe(folder, data={"num_workers": 2}), count=5))
    assert not equal(plain, steps_of(tiny_recipe(folder, runtime={"seed": 12}), count=5))
    epoch = [name for batch in plain[:3] for name in batch.sample_ids]
    assert len(set(epoch)) == 24


def test_text_only_steps(tmp_path: Path) -> None:
    config = tiny_recipe(tmp_path)
    records = json.loads(Path(config.data.path).read_text())
    Path(config.data.path).write_text(json.dumps([record for record in records if "image" not in record]))
    batch = steps_of(config, count=1)[0]
    assert batch.num_media == 0 and batch.windows[0].spans == () and batch.windows[0].pixels.shape == (0, 3, 28, 28)


def test_a_length_that_the_ranks_cannot_cut_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = "rows of training.sequence_length 79 tokens are padded to 80"
    for ring, is_told in ((2, True), (1, False)):
        parallel, training = {"ring": ring}, {"sequence_length": 79}
        config = tiny_recipe(folder, data={"packing": True}, parallel=parallel, training=training)
        (batch,) = steps_of(config, GridSizes(ring=ring), count=1)
        assert batch.length == 79 + is_told and (told in " ".join(capsys.readouterr().out.split())) == is_told


def test_a_last_answer_that_is_written_otherwise_is_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By rank 0 of a run that trains earlier answers too; `render_turns: apart` trains each as the last."""
    tokenizer = load_tokenizer(tiny_recipe(tmp_path).model.language.tokenizer, "<image>")
    tokenizer.chat_template = QWEN3
    told = "!<|im_end|>\\n' is trained where it is the last, and '!<|im_end|>\\n' where it is not"
    for render_turns, rank, times in (("whole", 0, 1), ("whole", 1, 0), ("apart", 0, 0)):
        sections = {"data": {"render_turns": render_turns}, "training": {"sequence_length": 2048}}
        config = tiny_recipe(tmp_path, **sections)
        (step,) = build_loader(config, tokenizer, described(config, SPEC), GridSizes(data=2), rank, 0, 1)
        assert step.sample_ids
        assert " ".join(capsys.readouterr().out.split()).count(told) == times


def test_too_long_a_sample_is_named_before_the_first_step(folder: Path) -> None:
    config = tiny_recipe(folder, training={"sequence_length": 60})
    message = (
        r"train.json element \d+: sample 'sample-\d+' has \d+ tokens, images included; "
        r"training.sequence_length is 60 \(\d+ of 24 samples are longer\)"
    )
    with pytest.raises(DataError, match=message):
        steps_of(config)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_image_lost_during_the_run(tmp_path: Path, num_workers: int) -> None:
    """The error of a worker arrives as one line that names sample and file."""
    config = tiny_recipe(tmp_path, data={"num_workers": num_workers})
    steps_of(tiny_recipe(tmp_path), count=1)
    for number in range(24):
        for path in (tmp_path / "images").glob(f"{number}-*.png"):
            path.write_bytes(b"lost")
    with pytest.raises(DataError, match=r"^sample 'sample-\d+': image .*png cannot be read") as caught:
        steps_of(config, count=1)
    assert "\n" not in str(caught.value)


def test_file_changed_during_the_run(tmp_path: Path) -> None:
    config = tiny_recipe(tmp_path, data={"shuffle": False})
    tokenizer = load_tokenizer(config.model.language.tokenizer, "<image>")
    loader = build_loader(config, tokenizer, described(config, SPEC), GridSizes(), 0, 0, 1)
    text = Path(config.data.path).read_text()
    answer = json.loads(text)[0]["conversations"][1]["value"]
    Path(config.data.path).write_text(text.replace(f'"{answer}"', '"' + "?" * len(answer) + '"', 1))
    with pytest.raises(DataError, match="element 0: sample 'sample-0' has .* when it was indexed; the file changed"):
        list(loader)


def held_out_of(config: Config, sizes: GridSizes = ONE_RANK, rank: int = 0) -> list[StepBatch]:
    tokenizer = load_tokenizer(config.model.language.tokenizer, config.data.image_token)
    loader = build_held_out_loader(config, tokenizer, described(config, SPEC), sizes, rank)
    assert len(loader) == len(list(loader))  # every pass is a whole one
    return list(loader)


@pytest.mark.parametrize("num_samples", [3, 16, 21])
@pytest.mark.parametrize("sizes", [ONE_RANK, GridSizes(tensor=2, data=2)])
def test_held_out_samples_come_once_in_file_order(tmp_path: Path, num_samples: int, sizes: GridSizes) -> None:
    """What is trained on in all steps and ranks together is what is trained on in the file, once."""
    path = tiny_dataset(tmp_path, num_samples, "held_out.json")
    config = tiny_recipe(tmp_path, evaluation={"path": str(path)}, training={"micro_batch_size": 2})
    batches = held_out_of(config, sizes)
    names = [f"sample-{i}" for i in range(num_samples)]
    assert [name for batch in batches for name in batch.sample_ids] == names
    assert len(batches) == -(-num_samples // 8) and all(len(b.row_tokens) == len(b.sample_ids) for b in batches)
    trained: list[str] = []
    for rank in {sizes.replica_ranks(d)[0] for d in range(sizes.data)}:
        for batch in held_out_of(config, sizes, rank):
            assert sum(m.ids.shape[0] for m in batch.micro_batches) == 8 // sizes.data  # the shape of training's steps
            for micro_batch in batch.micro_batches:
                counts = (micro_batch.labels != -100).sum(1).tolist()
                trained += [name for name, count in zip(micro_batch.sample_ids, counts, strict=True) if count]
            assert batch.num_trained_tokens_local == sum(int((m.labels != -100).sum()) for m in batch.micro_batches)
    assert sorted(trained) == sorted(names)


def test_held_out_samples_are_checked_too(tmp_path: Path) -> None:
    path = tiny_dataset(tmp_path, 12, "held_out.json")
    config = tiny_recipe(tmp_path / "train", evaluation={"path": str(path)}, training={"sequence_length": 60})
    with pytest.raises(DataError, match="held_out.json element .* training.sequence_length is 60"):
        held_out_of(config)


def skipping(tmp_path: Path, path: Path, **data: Any) -> Config:
    return tiny_recipe(tmp_path, data={"path": str(path), "on_bad_sample": "skip", **data})


def test_bad_samples_dropped_while_indexing_change_nothing_else(tmp_path: Path) -> None:
    """Bitwise the batches of a file that never had them."""
    path, without, _ = bad_media.spoil(tmp_path)
    skipped = steps_of(skipping(tmp_path, path, num_workers=1), count=10)
    clean = steps_of(skipping(tmp_path, without), count=10)
    assert all(batch.faults_tolerated for batch in skipped)
    assert [batch.sample_ids for batch in skipped] == [batch.sample_ids for batch in clean]
    for one, other in zip(skipped, clean, strict=True):
        assert equal(one, other)


def test_images_that_cannot_be_decoded_are_blank(tmp_path: Path) -> None:
    path, _, blanked = bad_media.spoil(tmp_path)
    batches = steps_of(skipping(tmp_path, path), count=20)
    faulty: list[str] = []
    blank = MediaReader(SPEC, "pad").blank_pixels()
    for batch in batches:
        for window in batch.windows:
            assert len(window.faults) == len(window.own_spans)
            for span, fault, pixels in zip(window.own_spans, window.faults, window.pixels, strict=True):
                assert torch.equal(pixels, blank) == bool(fault)
                faulty += [span.sample_id] if fault else []
                assert FAULTS[fault] in ("none", "damaged")
    assert set(faulty) == blanked and len(faulty) >= bad_media.BLANKED["damaged"]


def test_an_image_lost_during_the_run_is_blank_under_skip(tmp_path: Path) -> None:
    config = skipping(tmp_path, tiny_dataset(tmp_path), shuffle=False)
    steps_of(config, count=1)
    (tmp_path / "images/1-0.png").unlink()
    window = steps_of(config, count=1)[0].windows[0]
    assert [FAULTS[fault] for fault in window.faults if fault] == ["missing"]
    assert window.own_spans[window.faults.index(FAULTS.index("missing"))].sample_id == "sample-1"


def test_bombs_are_one_line_under_error(tmp_path: Path) -> None:
    config = tiny_recipe(tmp_path)
    for image in (tmp_path / "images").iterdir():
        bad_media.bomb(image)
    with pytest.raises(DataError, match=r"^sample 'sample-.*png is too large to be decoded: .*pixels") as caught:
        steps_of(config, count=1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("sizes", [ONE_RANK, GridSizes(data=2)])
def test_grouped_steps_resume_exactly_on_any_layout(folder: Path, sizes: GridSizes) -> None:
    config = tiny_recipe(folder, data={"group_by_modality_length": True})
    whole = steps_of(config, count=7)
    resumed = steps_of(config, sizes, rank=sizes.world - 1, start=3, count=4)
    assert [batch.sample_ids for batch in resumed] == [batch.sample_ids for batch in whole[3:]]
    epoch = [name for batch in whole[:3] for name in batch.sample_ids]
    assert sorted(epoch) == sorted(f"sample-{i}" for i in range(24))
    mixed = [len({span.sample_id for span in batch.windows[0].spans}) not in (0, 8) for batch in whole[:3]]
    assert sum(mixed) == 1  # 18 samples with images, 6 without: two whole batches, and one of leftovers


def test_pixels_of_the_towers_own_processor(folder: Path) -> None:
    """Workers get the processor too."""
    config = tiny_recipe(folder, data={"image_mode": "processor", "num_workers": 1})
    tokenizer = load_tokenizer(config.model.language.tokenizer, config.data.image_token)
    (batch,) = build_loader(config, tokenizer, describe_model(config.model), ONE_RANK, 0, 0, 1)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    window = batch.windows[0]
    assert len(window.own_spans) > 3
    for span, pixels in zip(window.own_spans, window.pixels, strict=True):
        theirs = np.asarray(processor(Image.open(folder / span.path))["pixel_values"][0])
        assert torch.equal(pixels, torch.from_numpy(theirs))


def packing(folder: Path, **sections: Any) -> Config:
    """Rows of several of the 24 samples each; an epoch is two steps and a half."""
    training = {"sequence_length": 128, "global_batch_size": 4, **sections.pop("training", {})}
    return tiny_recipe(folder, data={"packing": True, **sections.pop("data", {})}, training=training, **sections)


def documents_of(batch: StepBatch) -> dict[str, list[list[int]]]:
    """Sample -> its ids, labels and positions, cut out of its row by the row's documents."""
    found: dict[str, list[list[int]]] = {}
    for micro_batch in batch.micro_batches:
        names = iter(micro_batch.sample_ids)
        for row, documents in enumerate(micro_batch.documents):
            held = torch.stack([t[row] for t in (micro_batch.ids, micro_batch.labels, micro_batch.position_ids)])
            for number, start in enumerate(documents.starts):
                interval = documents.interval(number)
                cut = held[:, start : interval.stop]
                if interval.stop == documents.length and not held[0, start:].any() and (cut[1] == IGNORE).all():
                    continue  # padding
                assert found.setdefault(name := next(names), cut.tolist()) == cut.tolist(), f"{name} is there twice"
        assert next(names, None) is None
    return found


def test_packed_documents_are_the_unpacked_samples(folder: Path) -> None:
    """Ids, labels and positions of every sample, wherever it stands; rows of one length; images in their places."""
    alone: dict[str, list[list[int]]] = {}
    for batch in steps_of(tiny_recipe(folder), count=3):
        for micro_batch, tokens in zip(batch.micro_batches, batch.row_tokens, strict=True):
            rows = torch.cat([micro_batch.ids, micro_batch.labels, micro_batch.position_ids])
            alone[micro_batch.sample_ids[0]] = rows[:, :tokens].tolist()
    assert len(alone) == 24
    seen: set[str] = set()
    for batch in steps_of(packing(folder, training={"micro_batch_size": 2}), count=3):
        assert batch.length == 128 and len(batch.row_tokens) == 4 < len(batch.sample_ids)
        found = documents_of(batch)
        assert tuple(found) == batch.sample_ids and all(found[name] == alone[name] for name in found)
        assert batch.sample_tokens == tuple(len(found[name][0]) for name in batch.sample_ids)
        assert batch.num_tokens == sum(batch.sample_tokens) == 4 * 128 - batch.num_padding_tokens
        assert 0 < batch.num_padding_tokens < 0.4 * 4 * 128, "little, for so few and short samples"
        trained = sum(label != IGNORE for _, labels, _ in found.values() for label in labels)
        assert batch.num_trained_tokens_local == trained
        seen.update(found)
        (window,) = batch.windows
        assert len(window.spans) == batch.num_media
        for span in window.spans:
            item, micro_batch = span.item, batch.micro_batches[span.item.micro_batch]
            at = item.start - micro_batch.document(item.row, item.start).start
            assert all(id_ == 0 for id_ in found[span.sample_id][0][at : at + item.num_tokens])
            image = Path(span.path).stem.partition("-")
            assert span.sample_id == f"sample-{image[0]}"
    assert seen == set(alone)


@pytest.mark.parametrize("sizes", LAYOUTS[1:])
def test_packed_steps_are_the_same_on_every_layout_and_after_a_resume(folder: Path, sizes: GridSizes) -> None:
    """Every sample once per epoch, whatever the ranks; step 3 begins in the second epoch."""
    config = packing(folder, parallel={"sequence": sizes.tensor > 1})
    whole = [documents_of(batch) for batch in steps_of(config, count=5)]
    resumed: list[dict[str, list[list[int]]]] = [{} for _ in range(3)]
    for data in range(sizes.data):
        batches = steps_of(config, sizes, sizes.replica_ranks(data)[0], start=2, count=3)
        for step, batch in zip(resumed, batches, strict=True):
            assert not step.keys() & documents_of(batch).keys()
            step |= documents_of(batch)
    assert resumed == whole[2:]
    other_micro_batches = steps_of(packing(folder, training={"micro_batch_size": 2}), count=5)
    assert [documents_of(batch) for batch in other_micro_batches] == whole


@pytest.mark.parametrize("how", ["rows", "samples"])
def test_held_out_samples_are_packed_once_each(tmp_path: Path, how: str) -> None:
    """Rows that training would fill from elsewhere are as few as a step's samples need."""
    held_out = {"path": str(tiny_dataset(tmp_path, 6, "held_out.json"))}
    batches = held_out_of(packing(tmp_path, data={"packing": how}, evaluation=held_out))
    assert [len(batch.sample_ids) for batch in batches] == [4, 2]
    assert [name for batch in batches for name in batch.sample_ids] == [f"sample-{number}" for number in range(6)]
    for batch in batches:
        assert sorted(documents_of(batch)) == sorted(batch.sample_ids)
        assert len(batch.row_tokens) == -(-batch.num_tokens // 128) and max(batch.row_tokens) <= batch.length <= 128
        assert all(set(labels) != {IGNORE} for _, labels, _ in documents_of(batch).values())


def test_long_samples_are_truncated_where_that_is_asked(tmp_path: Path) -> None:
    """An image that is cut off is neither counted nor read."""
    config = tiny_recipe(tmp_path, data={"on_long_sample": "truncate"}, training={"sequence_length": 60})
    with pytest.raises(DataError, match="hold no answer"):
        steps_of(config)
    records = [r for r in json.loads(Path(config.data.path).read_text()) if not isinstance(r.get("image"), list)]
    for record in records:
        if len(record["conversations"]) > 3:  # system turn, and two questions with their answers
            record["conversations"][3]["value"] = "<image>\n" + "how many " * 9
            record["image"] = [record["image"], "images/2-0.png"]
    Path(config.data.path).write_text(json.dumps(records))
    cut, whole = (
        {
            name: (tokens, sum(span.sample_id == name for window in batch.windows for span in window.own_spans))
            for batch in steps_of(recipe, count=3)
            for name, tokens in zip(batch.sample_ids, batch.sample_tokens, strict=True)
        }
        for recipe in (config, tiny_recipe(tmp_path, training={"sequence_length": 256}))
    )
    for batch in steps_of(config, count=3):
        assert batch.num_media == sum(len(window.spans) for window in batch.windows)
    changed = {name for name, (tokens, _) in whole.items() if tokens > 60}
    assert changed and all(cut[name] == whole[name] for name in whole.keys() - changed)
    for name in changed:
        assert cut[name][0] <= 60 and whole[name][1] == 2 and cut[name][1] in (1, 2)
    assert {cut[name][1] for name in changed} & {1}, "some lost an image"


def test_images_are_pinned_on_cuda_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for CUDA: which tensors, on which device, and that nothing else of a step changes."""
    config = tiny_recipe(folder)
    assert pinning() is None  # on the CPU, and where the device is not decided yet
    batch, pinned, devices = steps_of(config, count=1)[0], [], []

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor)
        return tensor.clone()

    @contextlib.contextmanager
    def device(wanted: torch.device) -> Iterator[None]:
        devices.append(wanted)
        yield

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(shape, "is_on_gpu", lambda: True)
    monkeypatch.setattr(loader, "is_on_gpu", lambda: True)
    monkeypatch.setattr(loader, "current_device", lambda: torch.device("cuda", 3))
    tokenizer = load_tokenizer(config.model.language.tokenizer, config.data.image_token)
    prepare = build_loader(config, tokenizer, described(config, SPEC), ONE_RANK, 0, 0, 1).prepare
    assert prepare is not None and not pinned
    copy = prepare(batch)
    assert devices == [torch.device("cuda", 3)] and equal(copy, batch)
    assert [id(x) for x in pinned] == [id(window.pixels) for window in batch.windows]
    assert all(new.pixels is not old.pixels for new, old in zip(copy.windows, batch.windows, strict=True))
