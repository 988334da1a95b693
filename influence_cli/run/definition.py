"""Loads the user's definition.py (which runs it), calls its functions, reports where they fail."""

import dataclasses
import hashlib
import importlib.util
import os
import site
import sys
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from influence_cli.errors import DefinitionError

REQUIRED = ("model", "train_data", "query_data", "loss")


@dataclasses.dataclass(frozen=True)
class Definition:
    """A loaded definition.py. `digest` covers it and the user's own modules that it imports."""

    path: Path
    digest: str
    module: ModuleType

    def has(self, name: str) -> bool:
        return callable(getattr(self.module, name, None))

    def raw(self, name: str) -> Callable[..., Any]:
        """The user's function itself; its exceptions pass through."""
        return getattr(self.module, name)

    def call(self, name: str, *args: Any) -> Any:
        """The user's function; an exception in it becomes a DefinitionError that names its line."""
        try:
            return self.raw(name)(*args)
        except (Exception, SystemExit) as error:
            raise describe_failure(self, name, error) from error


def load_definition(path: Path) -> Definition:
    """Runs a definition.py.

    Raises DefinitionError: no such file, syntax error, exception while loading, missing function.
    """
    path = path.absolute()
    if not path.is_file():
        raise DefinitionError(
            f"no definition at {path}",
            "`influence init` writes one to start from; --definition FILE names another file",
        )
    try:
        code = compile(path.read_text(encoding="utf-8"), str(path), "exec")
    except (SyntaxError, UnicodeDecodeError, ValueError) as error:
        where, what, text = "", str(error), ""
        if isinstance(error, SyntaxError):
            where, what, text = (
                f" line {error.lineno}" if error.lineno else "",
                error.msg,
                (error.text or "").strip(),
            )
        raise DefinitionError(
            f"{path.name} is not valid Python",
            f"{path}{where}: {what}",
            *([f"> {text}"] if text else []),
        ) from error
    spec = importlib.util.spec_from_loader("influence_definition", loader=None, origin=str(path))
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses and torch look their module up
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    before = set(sys.modules)
    try:
        exec(code, module.__dict__)
    except (Exception, SystemExit) as error:
        raise DefinitionError(
            f"{path.name} raised {type(error).__name__} while it was loaded: {error}",
            *list_user_frames(error, path.parent),
        ) from error
    missing = [name for name in REQUIRED if not callable(getattr(module, name, None))]
    if missing:
        raise DefinitionError(
            f"{path.name} lacks {' and '.join(f'{name}()' for name in missing)}",
            f"expected: {', '.join(REQUIRED)}; `influence init` writes a commented example",
        )
    return Definition(path, digest_sources(path, set(sys.modules) - before), module)


def digest_sources(path: Path, imported: set[str]) -> str:
    """sha256 of the definition and the user's own modules: those beside it, and those that it
    `imported` from elsewhere and that are not installed packages."""
    installed = {
        sysconfig.get_path("stdlib"),
        sysconfig.get_path("platstdlib"),
        sys.prefix,
        sys.base_prefix,
    }
    installed |= {
        *site.getsitepackages(),
        site.getusersitepackages(),
        str(Path(__file__).parents[1]),
    }
    roots, beside = tuple(root + os.sep for root in installed), str(path.parent) + os.sep
    # a function may import the modules beside it later
    sources = {path, *path.parent.glob("*.py")}
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or ""
        own = (file.startswith(beside) and "site-packages" not in file) or (
            name in imported and not file.startswith(roots)
        )
        if own and file.endswith(".py"):
            sources.add(Path(file))
    digest = hashlib.sha256()
    for text in sorted(source.read_bytes() for source in sources if source.is_file()):
        digest.update(hashlib.sha256(text).digest())
    return digest.hexdigest()


def describe_failure(definition: Definition, name: str, error: BaseException) -> DefinitionError:
    """An exception of a user's function as an error: type, text, last line of the user's code."""
    return DefinitionError(
        f"{name}() in {definition.path.name} raised {type(error).__name__}: {error}",
        *list_user_frames(error, definition.path.parent),
    )


def list_user_frames(error: BaseException, folder: Path) -> list[str]:
    own = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).is_relative_to(folder)
    ]
    lines = [f"at {frame.filename} line {frame.lineno}: {frame.line}" for frame in own[-1:]]
    return [*lines, "--debug shows the whole trace"]
