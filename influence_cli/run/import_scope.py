"""The imports of one definition, apart from those of the process and of other definitions.

A notebook imports modules of its own, and it opens several runs: two definitions may import
different modules of one name, or the same module before and after an edit. Inside a scope Python
knows the own modules of one definition. Outside, `sys` is as if the definition had never run.
"""

import contextlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from influence_cli.run.source_texts import SourceFinder, TextLoader
from influence_cli.run.static_imports import find_imported_files

NAME = "influence_definition"  # of the module that a definition.py becomes
SHARED = ("__main__", "influence_cli")  # modules that no scope replaces


class ImportScope:
    """The own modules of a definition. The first block that is entered imports them anew."""

    def __init__(self, definition: Path) -> None:
        self._definition = definition.absolute()
        self._modules: dict[str, ModuleType] = {}
        self._folders = [str(self._definition.parent)]  # what comes first in sys.path
        self._finder = SourceFinder()
        self._own_names: set[str] = {NAME}  # of modules and packages, without a dot

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Inside, import statements find the definition's modules. One scope at a time."""
        path, finders = list(sys.path), list(sys.meta_path)
        sys.path[:0] = self._folders
        if not self._modules:
            self._own_names |= self._find_names()
        hidden = self._take_modules(self._own_names)
        others = set(sys.modules)
        sys.modules.update(self._modules)
        sys.meta_path.insert(0, self._finder)
        try:
            yield
        finally:
            self._keep_imports(path, others)
            sys.modules.update(hidden)
            sys.path[:], sys.meta_path[:] = path, finders

    def _find_names(self) -> set[str]:
        """The names by which the definition may import own modules: of files beside it, and of
        those that import statements name."""
        files = set(self._definition.parent.glob("*.py"))
        with contextlib.suppress(OSError):  # load_definition reports a missing file
            content = self._definition.read_bytes()
            files |= find_imported_files(self._definition, content, self._finder.is_installed)
        names = set()
        for file in files:
            folders = [folder for folder in file.parents if (folder / "__init__.py").is_file()]
            names.add(folders[-1].name if folders else file.stem)
        return names

    def _take_modules(self, names: set[str]) -> dict[str, ModuleType]:
        """Removes the modules of these names from sys.modules, but no installed ones."""
        own = {
            name: module
            for name, module in sys.modules.items()
            if name.partition(".")[0] in names.difference(SHARED)
            and not self._finder.is_installed(getattr(module, "__file__", None) or "")
        }
        for name in own:
            del sys.modules[name]
        return own

    def _keep_imports(self, path: list[str], others: set[str]) -> None:
        """Takes what the block imported, and what it added to sys.path. `others`: the modules of
        the process."""
        new = {name: module for name, module in sys.modules.items() if name not in others}
        self._own_names |= {
            name.partition(".")[0]
            for name, module in new.items()
            if isinstance(getattr(getattr(module, "__spec__", None), "loader", None), TextLoader)
        }
        self._modules = self._take_modules(self._own_names)
        beside = str(self._definition.parent)
        self._folders = [f for f in sys.path if f not in path or f == beside]
        finder = next((f for f in sys.meta_path if isinstance(f, SourceFinder)), self._finder)
        self._finder = finder
