"""The house keeps its shape: who may import whom, how quickly it answers, and that help and docs
cover every command.
"""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import influence_cli
from influence_cli.evaluate.table import PROTOCOLS
from influence_cli.methods.table import METHODS

ROOT = Path(influence_cli.__file__).parent
COMMANDS = (
    "cache", "check", "convert", "evaluate", "export", "init", "inspect", "merge", "methods", "report", "score", "select", "self", "trace",
)  # fmt: skip

# room -> what of ours it may use; `progress` and `errors` are everybody's (docs/architecture.md)
FORMS = ("gradients.forms", "gradients.form_ops", "gradients.row_products")
MAY_USE = {
    "errors": (),
    "progress": (),
    "signals": (),
    "parallel": ("parallel",),
    "storage": ("storage",),
    "run": ("run", "storage"),
    "gradients": ("gradients",),
    "cache": ("storage", "cache", *FORMS),
    "cache.identity": ("storage", "cache", *FORMS, "gradients.projection", "gradients.tf32"),
    "extraction": ("storage", "cache", "gradients", "parallel", "run", "extraction"),
    "preconditioners": (
        *("cache", "extraction", "run", "storage", "preconditioners"),
        *("gradients.curvature", "gradients.sparse_forms", *FORMS),
    ),
    "preconditioners.kinds": (),
    "methods": (
        "preconditioners",
        "cache",
        "extraction",
        *("gradients.curvature", "gradients.batch_statistics"),
        "gradients.curvature_check",
        "gradients.joint_projection",
        "gradients.sparse_forms",
        *FORMS,
        "methods",
        "output.ranking",
        "parallel",
        "run",
        "storage",
    ),
    "output": ("output", "storage"),
    "report": ("report", "output", "run"),
    "diagnostics": (
        "diagnostics",
        "storage",
        "run",
        "cache",
        "extraction",
        "gradients",
        "methods",
        "evaluate.correlation",
    ),
    "evaluate": (
        *("storage", "run", "cache", "extraction", "methods", "evaluate"),
        *("output.ranking", "output.score_tables"),
    ),
    "integrations": ("integrations", "run", "storage"),
    "api": (
        *("api", "run", "storage", "cache", "gradients", "extraction", "methods", "output"),
        *("parallel", "report", "integrations.tables"),
    ),
    "cli": ("",),
}
THIRD_PARTY = {
    "errors": (),
    "progress": (),
    "signals": (),
    "parallel": ("torch", "numpy"),
    "storage": ("torch", "numpy"),
    "run": ("torch", "numpy"),
    "run.adapters": ("torch", "peft"),
    "run.converted_weights": ("torch", "transformers"),
    "gradients": ("torch",),
    "gradients.random_tables": ("torch", "numpy"),
    "cache": ("torch", "numpy"),
    "extraction": ("torch", "numpy"),
    "methods": ("torch", "numpy"),
    "preconditioners": ("torch",),
    "output": ("numpy", "rich", "pyarrow"),
    "report": ("numpy", "jinja2", "markupsafe", "PIL"),
    "diagnostics": ("torch", "numpy"),
    "evaluate": ("torch", "numpy"),
    "integrations": (
        *("torch", "numpy", "transformers", "tokenizers", "peft"),
        *("datasets", "pyarrow", "PIL", "lightning"),
    ),
    "api": ("torch", "numpy", "pandas"),
    "cli": ("typer", "rich", "numpy", "torch"),
}
MODULES = sorted(
    str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__")
    for path in ROOT.rglob("*.py")
    if ("templates" not in path.parts and path.parent != ROOT)
    or path.stem in ("errors", "progress")
)


@cache
def parse(module: str) -> ast.Module:
    return ast.parse(source(module))


@cache
def source(module: str) -> str:
    path = ROOT / module.replace(".", "/")
    return (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()


@cache
def imports(module: str) -> set[str]:
    tree = parse(module)
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            inner = (
                {f"{node.module}.{alias.name}" for alias in node.names} if node.module else set()
            )
            modules = {
                name
                for name in inner
                if (ROOT.parent / (name.replace(".", "/") + ".py")).exists()
                or (ROOT.parent / name.replace(".", "/")).is_dir()
            }
            found |= modules or {node.module or ""}
    return found


def room(table: dict, module: str):
    return table[
        next(
            name
            for name in sorted(table, key=len, reverse=True)
            if module == name or module.startswith(f"{name}.")
        )
    ]


@pytest.mark.parametrize("module", MODULES)
def test_rooms_import_only_what_the_table_allows(module):
    if module == "cache":
        return  # its __init__ says what the room is for
    allowed = (*room(MAY_USE, module), "errors", "progress")
    for name in imports(module):
        top = name.split(".")[0]
        if top == "influence_cli":
            inner = name.removeprefix("influence_cli").lstrip(".")
            fits = inner == "" or any(
                rule == "" or inner == rule or inner.startswith(f"{rule}.") for rule in allowed
            )
            assert fits, f"{module} imports {name}"
        elif top not in sys.stdlib_module_names:
            assert top in room(THIRD_PARTY, module), f"{module} imports {name}"


WRITING_METHODS = {"memmap", "rename", "tofile", "touch", "truncate", "write_bytes", "write_text"}
WRITING_FUNCTIONS = {"os.replace", "os.rename", "torch.save", "np.save", "np.savez"}
# calls outside storage/ that look like them, with the reason
ALLOWED_WRITERS = {
    ("evaluate.result_log", "os.truncate"): "drops the incomplete last line of a killed process",
    ("cli.streams", "os.open"): "opens /dev/null for a stream that is closed",
}


def writes_a_file(call: ast.Call) -> bool:
    name = ast.unparse(call.func)
    last = name.rpartition(".")[2]
    if last == "open":
        return any(
            re.fullmatch(r"'[rbt]*[wax+][rbt+]*'|.*O_(WRONLY|RDWR).*", ast.unparse(value))
            for value in (*call.args, *(keyword.value for keyword in call.keywords))
        )
    if last == "replace" and "." in name:  # Path.replace(target), not str.replace(old, new)
        return name in WRITING_FUNCTIONS or (len(call.args) == 1 and not call.keywords)
    return name in WRITING_FUNCTIONS or ("." in name and last in WRITING_METHODS)


@pytest.mark.parametrize("code", [
    "open(path, 'w')", "path.open('ab')", "path.open(mode='x')", "os.open(path, os.O_WRONLY)",
    "os.replace(old, new)", "old.replace(new)", "path.write_text('')", "rows.tofile(path)",
])  # fmt: skip
def test_the_house_knows_a_call_that_writes_a_file(code):
    assert writes_a_file(ast.parse(code).body[0].value)  # type: ignore[attr-defined]  # a call


@pytest.mark.parametrize("module", [name for name in MODULES if name.split(".")[0] != "storage"])
def test_only_storage_writes_files(module):
    """Everybody else calls storage: a file appears complete or not at all."""
    assert not any(name.split(".")[0] == "safetensors" for name in imports(module))
    for node in ast.walk(parse(module)):
        if isinstance(node, ast.Call) and (module, ast.unparse(node.func)) not in ALLOWED_WRITERS:
            assert not writes_a_file(node), f"{module} line {node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("method", METHODS)
def test_methods_do_not_import_each_other(method):
    names = {name.replace("-", "_") for name in METHODS}
    own = method.replace("-", "_")
    others = {f"influence_cli.methods.{name}" for name in names - {own}}
    assert not imports(f"methods.{own}") & others


@pytest.mark.parametrize("module", [name for name in MODULES if name.split(".")[0] == "cli"])
def test_the_command_line_names_no_method_and_no_protocol(module):
    """Methods and protocols own what is particular to them; cli/ reads their declarations."""
    tree = parse(module)
    names = {*METHODS, *PROTOCOLS} - {"influence"}  # the program has the name of a method
    words = names | {name.replace("-", "_") for name in names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            for name in words - {"random"}:  # an English word, too
                assert not re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", node.value), name
            assert node.value not in names
        bound = {
            ast.Name: "id", ast.Attribute: "attr", ast.alias: "name", ast.FunctionDef: "name",
        }.get(type(node))  # fmt: skip
        if bound and not (isinstance(node, ast.alias) and "." in node.name):
            assert getattr(node, bound) not in words


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout


def test_help_leaves_torch_alone():
    """In one process: the first command that loads them is at fault."""
    helps = [["--help"], ["--version"], *([command, "--help"] for command in COMMANDS)]
    output = run(f"""
import sys
from influence_cli.cli import main
for arguments in {helps}:
    sys.argv = ["influence", *arguments]
    try: main()
    except SystemExit: pass
    print("\\nLOADED", *arguments, [m for m in ("torch", "numpy", "safetensors") if m in sys.modules])
""")
    lines = [line for line in output.splitlines() if line.startswith("LOADED")]
    assert lines == [f"LOADED {' '.join(arguments)} []" for arguments in helps]


def test_importing_the_package_imports_no_torch():
    assert run("import sys, influence_cli; print('torch' in sys.modules)").strip() == "False"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_helps_with_an_example(command, influence):
    result = influence(command, "--help")
    assert result.code == 0
    assert f"Example: influence {command}" in result.out


def test_each_heading_stands_once_in_a_command_of_the_reference():
    sections = (ROOT.parent / "docs" / "commands.md").read_text().split("\n## ")[1:]
    assert len(sections) == len(COMMANDS) + 1
    for section in sections:
        headings = re.findall(r"^([A-Z].*):$", section, re.M)
        flags = re.findall(r"^- `(--[a-z-]+|-o)", section, re.M)
        assert len(headings) == len(set(headings)), section[:30]
        assert len(flags) == len(set(flags)), section[:30]


def test_each_flag_of_a_command_is_in_its_section_or_among_the_shared_flags(influence):
    text = (ROOT.parent / "docs" / "commands.md").read_text()
    *sections, shared = text.split("\n## ")[1:]
    described = re.compile(r"^- `(?:-o, )?(--[a-z-]+|[A-Z]+)", re.M)
    for command, section in zip(COMMANDS, sections, strict=True):
        named = re.findall(r"`([^`]+)`", section.partition("\nShared flags:")[2])
        assert section.startswith(f"influence {command}\n")
        assert set(named) <= set(described.findall(shared)), command
        flags = {*described.findall(section), *named, "--help"}
        assert (
            set(re.findall(r"^│ (?:-o, )?(--[a-z-]+)", influence(command, "--help").out, re.M))
            <= flags
        )


def test_the_defaults_of_an_optimizer_are_read_without_torchs_compiler():
    code = """
import sys
from types import SimpleNamespace
from pathlib import Path
from influence_cli.run.optimizers import read_options
group = SimpleNamespace(options={"momentum": 0.9})
options = read_options(SimpleNamespace(optimizer="sgd", path=Path("t"), groups=[group]), 0)
print(options["momentum"], options["dampening"], "torch._dynamo" in sys.modules)
"""
    assert run(code).split() == ["0.9", "0", "False"]


def test_the_changelog_has_the_version():
    assert f"## {influence_cli.__version__}" in (ROOT.parent / "CHANGELOG.md").read_text()


def test_the_references_are_up_to_date():
    script = ROOT.parent / "docs" / "generate.py"
    space: dict = {"__file__": str(script), "__name__": "generate"}
    exec(script.read_text(), space)
    for page, written in (("commands.md", "reference"), ("python.md", "python_reference")):
        assert (ROOT.parent / "docs" / page).read_text() == space[written](), (
            "run: python docs/generate.py"
        )


# names that say nothing of their content (a participle, a pronoun), and what to use: a noun
EMPTY_NAMES = {
    "found",
    "whole",
    "there",
    "asked",
    "taken",
    "held",
    "apart",
    "ours",
    "theirs",
    "mine",
    "going",
    "few",
    "each",
    "told",
}


def bound_names(tree: ast.Module) -> set[str]:
    """The names that a module binds: variables, parameters, attributes, functions, classes."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.alias):
            names.add(node.asname or node.name)
    return names


@pytest.mark.parametrize("module", MODULES)
def test_names_say_what_they_hold(module):
    assert not {name.lower() for name in bound_names(parse(module))} & EMPTY_NAMES
    assert not set(module.split(".")) & EMPTY_NAMES


def test_no_two_classes_share_a_name():
    classes = [
        node.name
        for module in MODULES
        for node in ast.walk(parse(module))
        if isinstance(node, ast.ClassDef)
    ]
    assert len(classes) == len(set(classes)), sorted(n for n in classes if classes.count(n) > 1)


@pytest.mark.parametrize("module", MODULES)
def test_functions_and_files_are_short(module):
    text = source(module)
    assert text.count("\n") <= 350
    for node in ast.walk(parse(module)):
        if isinstance(node, ast.FunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            assert lines <= 50, node.name
