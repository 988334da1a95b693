"""Finds the user's own modules that a definition may import, by the text of its import statements.

A function may import a module long after the definition was loaded. Its digest must be known by
then. Modules that are imported under a computed name are not found.
"""

import ast
import contextlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

Module = tuple[Path, str]  # its file, and the package that its relative imports begin at


def find_imported_files(
    definition: Path, content: bytes, is_installed: Callable[[str], bool]
) -> set[Path]:
    """The files of own modules that the definition's text imports, and those that they import."""
    files: set[Path] = set()
    todo: list[tuple[bytes, str]] = [(content, "")]
    while todo:
        text, package = todo.pop()
        for name in sorted(set(imported_names(text, package))):
            for file, inner_package in locate_modules(name):
                if file in files or file == definition or is_installed(str(file)):
                    continue
                files.add(file)
                with contextlib.suppress(OSError):  # vanished, or not readable
                    todo.append((file.read_bytes(), inner_package))
    return files


def imported_names(text: bytes, package: str) -> Iterator[str]:
    """The dotted names of the import statements of a text, also of those in functions."""
    try:
        with warnings.catch_warnings(action="ignore"):  # importing the module shows them
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1]
            begin = [*parents, node.module] if node.level else [node.module]
            base = ".".join(filter(None, begin))
            # each name may be a module of the package `base`, or something inside it
            yield from (f"{base}.{alias.name}" for alias in node.names)


def locate_modules(name: str) -> Iterator[Module]:
    """The files of a dotted name: its packages and its module. It imports nothing."""
    first, *others = name.split(".")
    try:
        spec = importlib.util.find_spec(first)
    except (ImportError, ValueError, AttributeError):
        return
    if spec is None:
        return
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if spec.origin and spec.origin.endswith(".py") and Path(spec.origin).is_file():
        yield Path(spec.origin), first if folders else ""
    package = first
    for part in others:
        files = [folder / f"{part}.py" for folder in folders]
        yield from [(file, package) for file in files if file.is_file()][:1]
        package, folders = f"{package}.{part}", [folder / part for folder in folders]
        inits = [folder / "__init__.py" for folder in folders]
        yield from [(init, package) for init in inits if init.is_file()][:1]
