"""An own source of conversations: files of `image TAB question TAB answer` lines; no image where the line begins with
the tab.

A source says where records are and what the bytes of one mean. Several files, index, shuffling, workers, exact resume,
skipping of bad samples and --check-layout come with it. After changing what `parse` gives, remove the `.index` folder.

    extensions: [examples.extensions.own_source]
    data: {source: tsv, path: train.tsv}
"""

from collections.abc import Iterator
from pathlib import Path

from megatron_vlm.data.sample import BadSample, RecordKey, Sample, Turn
from megatron_vlm.data.sources import SOURCES, FileSource


@SOURCES.register("tsv")
class TsvFiles(FileSource):
    """One question and answer per line, UTF-8."""

    suffixes = (".tsv",)

    def places(self, path: Path) -> Iterator[tuple[int, int, int]]:
        """Offset, size and number of every line."""
        offset = 0
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                yield offset, len(line), number
                offset += len(line)

    def parse(self, raw: bytes, key: RecordKey) -> Sample:
        """A line. Raises BadSample where it is not three cells."""
        try:
            image, question, answer = raw.decode().rstrip("\n").split("\t")
        except ValueError as error:
            message = f"{self.origin(key)} is {raw[:60]!r}; image, question and answer in UTF-8 are needed"
            raise BadSample(message) from error
        marker = f"{self.image_token}\n" if image else ""
        turns = (Turn("user", marker + question), Turn("assistant", answer))
        return Sample(self.number(key), turns, (image,) if image else (), self.origin(key))
