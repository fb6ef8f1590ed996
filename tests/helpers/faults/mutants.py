"""A module with one thing in it written wrong, so that a test can show that it would be noticed."""

import importlib.util
from pathlib import Path
from types import ModuleType


def mutant(name: str, right: str, wrong: str, folder: Path) -> ModuleType:
    """The module `name`, `wrong` in the place of `right` wherever that stands; a file in `folder`, since Triton reads
    the source of kernels. The module itself stays as it is: put the mutant in its place."""
    found = importlib.util.find_spec(name)
    assert found is not None and found.origin is not None, name
    source = Path(found.origin).read_text()
    assert right in source, f"{name} has no {right!r}"
    path = folder / f"{name.rpartition('.')[2]}_mutant.py"
    path.write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location(f"{path.stem}_{folder.name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
