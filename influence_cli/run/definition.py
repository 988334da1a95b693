"""Loads the user's definition.py (which runs it), calls its functions, reports where they fail."""

import dataclasses
import hashlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from influence_cli.errors import DefinitionError, InfluenceError
from influence_cli.run.import_scope import NAME
from influence_cli.run.source_texts import SourceFinder, install_finder
from influence_cli.run.static_imports import find_imported_files

REQUIRED = ("model", "train_data", "query_data", "loss")
ARGUMENTS = {
    **dict.fromkeys(("model", "train_data", "query_data"), ()),
    **dict.fromkeys(
        ("loss", "measure", "measure_tokens", "features", "outputs"), ("model", "batch")
    ),
    "loss_from_outputs": ("outputs", "batch"),
    "collate": ("items",),
    **dict.fromkeys(("label", "describe", "image", "id"), ("example",)),
    "example": ("row",),
    "relabel": ("example", "label"),
    "sample": ("outputs", "batch", "generator"),
    "token": ("id",),
    "train": ("indices", "seed"),
}


@dataclasses.dataclass(frozen=True)
class Definition:
    """A loaded definition.py. `digest` covers it and the user's own modules that it imports.

    `late`: digests of the modules that its functions may still import: those beside it, and those
    that import statements name. `imported`: digests of the texts of own modules, as they were
    imported; it grows.
    """

    path: Path
    digest: str
    module: ModuleType
    imported: dict[Path, str] = dataclasses.field(default_factory=dict)
    late: dict[Path, str] = dataclasses.field(default_factory=dict)

    def has(self, name: str) -> bool:
        return callable(getattr(self.module, name, None))

    def check_unchanged(self) -> None:
        """Raises DefinitionError where a module that a function imported has another text than the
        one in `digest`: gradients of one text would be stored under the other's digest."""
        loaded = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
        for file, digest in self.late.items():
            text = self.imported.get(file)  # None: it was loaded without the import statement
            if text is None and str(file) in loaded:
                text = digest_file(file)
            if text not in (None, digest):
                raise DefinitionError(
                    f"{file.name} changed while the command ran",
                    f"{file}: a function of {self.path.name} imported it after that",
                    "finished units are kept; run the same command again",
                )

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
    content = path.read_bytes()
    code = compile_definition(path, content)
    spec = importlib.util.spec_from_loader(NAME, loader=None, origin=str(path))
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses and torch look their module up
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    before, beside, finder = set(sys.modules), read_modules_beside(path), install_finder()
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
    texts = {
        file: finder.digests.get(file) or digest_file(file)
        for file in find_own_modules(path, set(sys.modules) - before, finder)
    }
    named = find_imported_files(path, content, finder.is_installed) - beside.keys()
    late = {file: digest for file, digest in beside.items() if file not in texts}
    late |= {file: digest_file(file) for file in sorted(named) if file not in texts}
    own = hashlib.sha256(content).hexdigest()
    digest = join_digests([own, *texts.values(), *late.values()])
    return Definition(path, digest, module, finder.digests, late)


def compile_definition(path: Path, content: bytes) -> CodeType:
    """Raises DefinitionError for a syntax error, or bytes that are not UTF-8."""
    try:
        return compile(content.decode(), str(path), "exec")
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


def read_modules_beside(path: Path) -> dict[Path, str]:
    """The digest of each module beside the definition."""
    files = sorted(file for file in path.parent.glob("*.py") if file != path and file.is_file())
    return {file: digest_file(file) for file in files}


def digest_file(file: Path) -> str:
    """sha256 of a file; empty where it is gone."""
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError:
        return ""


def join_digests(digests: list[str]) -> str:
    return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()


def find_own_modules(path: Path, imported: set[str], finder: SourceFinder) -> set[Path]:
    """The files of the user's own modules that are loaded, without the definition: those beside it,
    and those that it `imported` from elsewhere and that are not installed packages."""
    beside = str(path.parent) + os.sep
    sources = set()
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or ""
        own = (file.startswith(beside) and "site-packages" not in file) or (
            name in imported and not finder.is_installed(file)
        )
        if own and file.endswith(".py") and Path(file).is_file():
            sources.add(Path(file))
    return sources - {path}


def describe_failure(definition: Definition, name: str, error: BaseException) -> DefinitionError:
    """An exception of a user's function as an error: type, text, last line of the user's code."""
    called = [other for other in ARGUMENTS if str(error).startswith(f"{other}() ")]
    for function in (name, *called) if isinstance(error, TypeError) else ():
        if wrong := find_wrong_arguments(definition, function):
            return DefinitionError(
                f"{function}() in {definition.path.name} does not take the arguments that "
                "influence passes",
                f"found:    def {function}{wrong}",
                f"expected: def {function}({', '.join(ARGUMENTS[function])})",
            )
    if isinstance(error, InfluenceError):  # of influence_cli.huggingface and other integrations
        where = f"{name}() in {definition.path.name}"
        return DefinitionError(f"{where}: {error.headline}", *error.details)
    return DefinitionError(
        f"{name}() in {definition.path.name} raised {type(error).__name__}: {error}",
        *list_user_frames(error, definition.path.parent),
    )


def find_wrong_arguments(definition: Definition, name: str) -> str | None:
    """The arguments of a user's function and its place, where it can't be called as documented."""
    if not definition.has(name):
        return None
    function = inspect.unwrap(definition.raw(name))
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some functions of C have none
        return None
    try:
        signature.bind(*ARGUMENTS[name])
    except TypeError:
        code = getattr(function, "__code__", None)
        place = f" at {code.co_filename} line {code.co_firstlineno}" if code else ""
        return f"{str(signature)[:200]}{place}"
    return None


def list_user_frames(error: BaseException, folder: Path) -> list[str]:
    own = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).is_relative_to(folder)
    ]
    lines = [f"at {frame.filename} line {frame.lineno}: {frame.line}" for frame in own[-1:]]
    return [*lines, "--debug shows the whole trace"]
