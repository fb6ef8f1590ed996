"""An own source of conversations: a file of `image TAB question TAB answer` lines; no image where the line begins with
the tab.

A source says where records are and what the bytes of one mean. Index, shuffling, workers, exact resume, skipping of bad
samples and --check-layout come with it. After changing what `parse` gives, remove the file's `.index` folder.

    extensions: [examples.extensions.own_source]
    data: {source: tsv, path: train.tsv}
"""

from megatron_vlm.data.sample import BadSample, Sample, Turn
from megatron_vlm.data.sources import SOURCES, Extent, RecordFile


@SOURCES.register("tsv")
class TsvFile(RecordFile):
    """One question and answer per line, UTF-8."""

    def scan(self) -> list[Extent]:
        """Every line."""
        extents, offset = [], 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, start=1):
                extents.append(Extent(offset, len(line), number))
                offset += len(line)
        return extents

    def parse(self, raw: bytes, origin: str, default_id: str) -> Sample:
        """A line. Raises BadSample where it is not three cells."""
        try:
            image, question, answer = raw.decode().rstrip("\n").split("\t")
        except ValueError as error:
            raise BadSample(f"{origin} is {raw[:60]!r}; image, question and answer in UTF-8 are needed") from error
        marker = f"{self.image_token}\n" if image else ""
        turns = (Turn("user", marker + question), Turn("assistant", answer))
        return Sample(default_id, turns, (image,) if image else (), origin)
