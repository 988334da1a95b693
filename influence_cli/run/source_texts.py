"""Imports the user's own modules from their text, and remembers the digest of each text.

Python may run bytecode of another text: it compares only the size and the second of the last
change. And a file that is read again after its import may have another text by then.
"""

import hashlib
import importlib
import os
import site
import sys
import sysconfig
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

PACKAGE_FOLDERS = tuple(f"{os.sep}{name}{os.sep}" for name in ("site-packages", "dist-packages"))


class SourceFinder(MetaPathFinder):
    """The first finder of `sys.meta_path`; there is one at a time.

    `digests`: sha256 of the text of each own module that it imported.
    """

    def __init__(self) -> None:
        self.digests: dict[Path, str] = {}
        self._installed_roots = installed_roots()

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """What the other finders find; an own module is loaded by a TextLoader."""
        for finder in sys.meta_path:
            if isinstance(finder, SourceFinder) or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is None:
                continue
            file = spec.origin
            if type(spec.loader) is SourceFileLoader and file and not self.is_installed(file):
                spec.loader = TextLoader(name, file, self.digests)
            return spec
        return None

    def is_installed(self, file: str) -> bool:
        """Also packages of another environment, which PYTHONPATH or a .pth file names."""
        return file.startswith(self._installed_roots) or any(
            folder in file for folder in PACKAGE_FOLDERS
        )


class TextLoader(SourceFileLoader):
    """Compiles the text of a module, and never runs bytecode that was compiled before."""

    def __init__(self, name: str, file: str, digests: dict[Path, str]) -> None:
        super().__init__(name, file)
        self._digests = digests

    def get_code(self, fullname: str) -> CodeType:
        file = self.get_filename(fullname)
        content = self.get_data(file)
        self._digests[Path(file)] = hashlib.sha256(content).hexdigest()
        return self.source_to_code(content, file)


def install_finder() -> SourceFinder:
    """Puts a new finder before all others, and removes an earlier one."""
    others = [finder for finder in sys.meta_path if not isinstance(finder, SourceFinder)]
    finder = SourceFinder()
    sys.meta_path[:] = [finder, *others]
    importlib.invalidate_caches()
    return finder


def installed_roots() -> tuple[str, ...]:
    """The folders of Python, of installed packages and of this package."""
    roots = {
        sysconfig.get_path("stdlib"),
        sysconfig.get_path("platstdlib"),
        sys.prefix,
        sys.base_prefix,
        *site.getsitepackages(),
        site.getusersitepackages(),
        str(Path(__file__).parents[1]),
    }
    return tuple(root + os.sep for root in roots)
