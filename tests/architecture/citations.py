"""Citations of decisions in code and documents, and the headings that they lead to.

Four forms, and no others: `DESIGN D6` or `DESIGN 5` (docs/design.md; several as `DESIGN D5, D6`), `traps B8`
(docs/traps.md), `STYLE 4` (CONTRIBUTING.md), `docs/decisions/0006`. Whatever only looks like one of them is a fault,
and so is a document that is named and not there, or the number of an issue of ours.
"""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.architecture.sources import ROOT

FOLDERS = ("megatron_vlm", "kernels", "tools", "examples", "tests", "docs")
SUFFIXES = (".py", ".md", ".yaml", ".sh", ".sbatch", ".css", ".toml")
WITHOUT_SUFFIX = ("Makefile", "Dockerfile")
MADE_WHILE_RUNNING = ("runs/", "out/")

CODES = r"D?\d+(?:,\s+D?\d+)*\b"
FORMS = {
    "DESIGN": re.compile(rf"\bDESIGN\s+({CODES})"),
    "traps": re.compile(r"\btraps\s+([A-Z]\d+)\b"),
    "STYLE": re.compile(r"\bSTYLE\s+(\d+)\b"),
    "decisions": re.compile(r"\bdocs/decisions/(\d{4})"),
}
HEADINGS = {
    "DESIGN": ("docs/design.md", re.compile(r"^#{2,3} (D?\d+) ", re.MULTILINE)),
    "traps": ("docs/traps.md", re.compile(r"^## ([A-Z]\d+) ", re.MULTILINE)),
    "STYLE": ("CONTRIBUTING.md", re.compile(r"^(\d+)\. ", re.MULTILINE)),
}
HEADING = re.compile(r"^#.*", re.MULTILINE)
LOOKS_LIKE_ONE = re.compile(
    r"(?<![\w/.])(?:DESIGN|STYLE)\b(?!\.md)|\b[Dd]ecisions? \d{4}\b|(?<!docs/)\bdecisions/\d{4}|megatron-core-traps"
    r"|(?<![\w/.-])D\d{1,2}(?![\w-])"
)
DOCUMENT = re.compile(r"(?<![\w/<])(?:[\w.-]+/)+[\w.-]+\.md\b")
OWN_ISSUE = re.compile(r"(?:(\S+)\s+)?\bissues?\s+\d+", re.IGNORECASE)


def cited_files() -> list[Path]:
    """Every text file in which a citation counts, relative to the root."""
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES]
    found += [path for path in ROOT.iterdir() if path.suffix in SUFFIXES or path.name in WITHOUT_SUFFIX]
    return sorted(path.relative_to(ROOT) for path in found)


@cache
def headings(kind: str) -> frozenset[str]:
    """What may be cited: the numbers of that kind's headings, or of the pages in docs/decisions."""
    if kind == "decisions":
        return frozenset(path.name[:4] for path in (ROOT / "docs" / "decisions").glob("*.md"))
    document, pattern = HEADINGS[kind]
    return frozenset(pattern.findall((ROOT / document).read_text()))


def citations(text: str) -> Iterator[tuple[str, str]]:
    """(kind, number) of every citation."""
    for kind, form in FORMS.items():
        for found in form.finditer(text):
            yield from ((kind, number) for number in re.split(r",\s+", found[1]))


def faults(text: str, folder: Path = ROOT) -> Iterator[str]:
    """What in a text leads nowhere: citations without a heading, other forms of them, documents that are not there,
    neither from the root nor from the text's folder, numbers of issues."""
    for kind, number in citations(text):
        if number not in headings(kind):
            yield f"{kind} {number} has no heading"
    rest = HEADING.sub("", text)
    for form in FORMS.values():
        rest = form.sub("", rest)
    yield from (f"{found[0]!r} is not one of the forms of a citation" for found in LOOKS_LIKE_ONE.finditer(rest))
    for found in DOCUMENT.finditer(text):
        if not found[0].startswith(MADE_WHILE_RUNNING) and not any(
            (base / found[0]).exists() for base in (ROOT, folder)
        ):
            yield f"{found[0]} is not there"
    for found in OWN_ISSUE.finditer(text):
        if "/" not in (found[1] or ""):  # owner/repository issue 7 is somebody else's
            yield f"{found[0]!r} is no part of the product"
