"""Files are written in runs by several threads, byte for byte as safetensors lays them out."""

import errno
import os
import threading

import pytest
import torch
from safetensors.torch import load_file

from megatron_vlm.conversion.transfer import export_plan
from megatron_vlm.conversion.transfer.export_plan import (
    TOWER_FILE,
    PlannedTensor,
    ShardPlan,
    header_of,
    plan_fresh,
    plan_returned,
    write_shards,
)
from megatron_vlm.conversion.transfer.origin import reference_to
from megatron_vlm.conversion.transfer.origin_record import Origin

SHAPES = {"a": (3, 5), "b": (), "c": (0, 4), "d": (7,), "e": (64, 3), "f": (2, 2, 2)}


class Source:
    """Random tensors, which may be read once each, and remembers by which threads."""

    def __init__(self):
        generator = torch.Generator().manual_seed(5)
        self.tensors = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
        self.reads, self.threads, self.together = [], set(), threading.Barrier(2)

    def names(self):
        return self.tensors.keys()

    def dtype(self, name):
        return self.tensors[name].dtype

    def shape(self, name):
        return tuple(self.tensors[name].shape)

    def read(self, name):
        self.reads.append(name)
        self.threads.add(threading.get_ident())
        if len(self.reads) <= 2:
            self.together.wait(timeout=60)  # two are read at one time, or this breaks
        return self.tensors[name]


@pytest.fixture
def source(monkeypatch):
    monkeypatch.setattr(export_plan, "_RUN_BYTES", 16)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    return Source()


def shards_of(source):
    """Two files; `f` is rounded."""
    first = [PlannedTensor(name, f"x.{name}", torch.float32, source.shape(name)) for name in "abc"]
    second = [PlannedTensor(name, name, torch.float32, source.shape(name)) for name in "de"]
    second.append(PlannedTensor("f", "f", torch.bfloat16, source.shape("f")))
    return [ShardPlan(f"{n}.safetensors", part, header_of(part)) for n, part in enumerate((first, second))]


def test_threads_write_what_safetensors_reads(source, tmp_path):
    told = []
    write_shards(tmp_path, shards_of(source), source, told.append)
    first, second = load_file(tmp_path / "0.safetensors"), load_file(tmp_path / "1.safetensors")
    assert all(torch.equal(first[f"x.{name}"], source.tensors[name]) for name in "abc")
    assert all(torch.equal(second[name], source.tensors[name]) for name in "de")
    assert torch.equal(second["f"], source.tensors["f"].bfloat16())
    assert sorted(source.reads) == sorted(SHAPES) and len(source.threads) == 2
    assert sum(told) == sum(shard.size_bytes for shard in shards_of(source))


def test_runs_cover_a_file_without_gap_or_overlap(source):
    for shard in shards_of(source):
        place, tensors = len(shard.header), []
        for start, run in shard.runs():
            assert start == place
            place += sum(tensor.size_bytes for tensor in run)
            tensors += run
        assert tensors == list(shard.tensors)


def test_a_full_disk_is_raised_when_all_threads_have_ended(source, tmp_path, monkeypatch):
    write = os.pwrite

    def full(handle, data, place):
        if len(data) == 64 * 3 * 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(handle, data, place)

    monkeypatch.setattr(os, "pwrite", full)
    before = threading.active_count()
    with pytest.raises(OSError, match="No space left"):
        write_shards(tmp_path, shards_of(source), source, lambda num_bytes: None)
    assert threading.active_count() == before


def test_short_writes_are_gone_on_with(source, tmp_path, monkeypatch):
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda handle, data, place: write(handle, data[:7], place))
    shards = plan_fresh(source.names(), source, str.upper, lambda name: None)
    write_shards(tmp_path, shards, source, lambda num_bytes: None)
    read = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(read[name.upper()], tensor) for name, tensor in source.tensors.items())


@pytest.mark.parametrize(
    ("stored", "is_written"),
    [
        (lambda tensor: tensor, False),
        (lambda tensor: tensor.bfloat16(), False),  # frozen, in a run of bf16
        (lambda tensor: tensor.bfloat16() + 1, True),
        (lambda tensor: tensor * 1.0001, True),
        (lambda tensor: tensor.bfloat16().float(), True),
    ],
)
def test_a_named_tower_is_written_only_where_it_is_another_in_the_dtype_it_is_stored_in(tmp_path, stored, is_written):
    source = Source()
    origin = Origin(tmp_path, "llava", {}, {name: reference_to(source.tensors[name]) for name in "ad"}, {})
    source.tensors = {name: stored(source.tensors[name]) for name in "ad"}
    source.together = threading.Barrier(1)
    shards = plan_returned(origin, source, str.upper, None, is_same=True)
    assert [shard.file for shard in shards] == ([TOWER_FILE] if is_written else [])


def test_a_named_tower_of_fewer_digits_is_known_again_in_more(tmp_path):
    source = Source()
    origin = Origin(tmp_path, "llava", {}, {"a": reference_to(source.tensors["a"].half())}, {})
    source.tensors = {"a": source.tensors["a"].half().float()}
    source.together = threading.Barrier(1)
    assert plan_returned(origin, source, str.upper, None, is_same=True) == []
    source.tensors["a"] *= 1 + 1e-6  # which fp16 would round away
    assert [shard.file for shard in plan_returned(origin, source, str.upper, None, is_same=True)] == [TOWER_FILE]
