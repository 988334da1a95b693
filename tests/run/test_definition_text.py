"""Gradients are stored under the digest of the very text that computed them."""

import os
import py_compile
import sys
from pathlib import Path

import pytest

from influence_cli.run.definition import Definition, load_definition
from tests.conftest import DEFINITION
from tests.refusals import refused, replaced

# the definition edits itself while it is imported, as a user's editor may
SELF_EDITING = (
    DEFINITION
    + """
from pathlib import Path as _Path

_own = _Path(__file__)
_own.write_text(_own.read_text().replace("* 1.0  # scale", "* 4.0  # scale"))
"""
)


def scaled(definition: str, scale: float) -> str:
    return (
        definition
        + f"""

_loss_once = loss


def loss(model, batch):
    return _loss_once(model, batch) * {scale}  # scale
"""
    )


def test_a_definition_that_is_edited_while_it_is_imported_gets_its_own_digest(make_run, influence):
    run = make_run("run", scaled(DEFINITION, 1.0))
    text = scaled(DEFINITION, 1.0) + SELF_EDITING.removeprefix(DEFINITION)
    (run / "definition.py").write_text(text)
    first = influence("score", run)  # computed with 1, while the file says 4
    assert first.code == 0, first.err
    assert "* 4.0" in (run / "definition.py").read_text()
    again = influence("score", run)
    if again.code == 0:  # otherwise the change was noticed
        assert again.out == influence("score", run, "--cache", "none").out
        assert again.out != first.out
    else:
        refused(again, 1, "belongs to another run")


MODULE = "SCALE = 1.0\n"


def load_afresh(folder: Path, *modules: str) -> Definition:
    """The definition of a folder, as a new process would load it."""
    for name in modules:
        sys.modules.pop(name, None)
    return load_definition(folder / "definition.py")


@pytest.mark.parametrize("name", ["beside_scale", "scales_package.inner", "elsewhere_scale"])
def test_a_module_that_is_edited_while_it_is_imported_gets_the_digest_of_its_text(
    name, tmp_path, monkeypatch
):
    folder, other = tmp_path / "run", tmp_path / "elsewhere"
    file = (other if name.startswith("elsewhere") else folder) / f"{name.replace('.', '/')}.py"
    file.parent.mkdir(parents=True)
    folder.mkdir(exist_ok=True)
    monkeypatch.syspath_prepend(other)
    edit = f"\n\nfrom pathlib import Path\nPath({str(file)!r}).write_text({MODULE!r})\n"
    (folder / "definition.py").write_text(DEFINITION + f"\nimport {name} as scale\n")
    names = name, name.partition(".")[0]
    file.write_text("SCALE = 4.0" + edit)
    edited = load_afresh(folder, *names)
    assert (edited.module.scale.SCALE, file.read_text()) == (4.0, MODULE)
    written = load_afresh(folder, *names)
    assert written.module.scale.SCALE == 1.0
    file.write_text("SCALE = 4.0" + edit)
    again = load_afresh(folder, *names)
    assert edited.digest == again.digest != written.digest


def test_bytecode_of_another_text_is_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    file = tmp_path / "compiled_scale.py"
    file.write_text("SCALE = 4.0\n")
    (tmp_path / "definition.py").write_text(DEFINITION + "\nimport compiled_scale\n")
    py_compile.compile(str(file))
    time = file.stat().st_mtime_ns
    file.write_text(MODULE)  # the same size
    os.utime(file, ns=(time, time))
    loaded = load_afresh(tmp_path, "compiled_scale")
    assert loaded.module.compiled_scale.SCALE == 1.0


def test_a_module_imported_by_a_function_after_an_edit_stores_nothing(make_run, influence):
    definition = replaced(
        DEFINITION,
        ("def train_data():\n", "def train_data():\n    edit_late_module()\n"),
    )
    definition += """

def edit_late_module():
    from pathlib import Path

    Path(__file__).with_name("late_scale.py").write_text("SCALE = 4.0\\n")
    import late_scale
"""
    run = make_run("run", definition)
    (run / "late_scale.py").write_text(MODULE)
    result = influence("score", run)
    refused(result, 1, "late_scale.py changed while the command ran")
    assert not list((run / ".influence").rglob("0*.safetensors"))


LATE = """

_loss_at_once = loss


def loss(model, batch):
    {statement}

    return _loss_at_once(model, batch) * {name}
"""
LATE_IMPORTS = {
    "a module": ("import late_one", "late_one.SCALE", "late_one.py"),
    "from a module": ("from late_two import SCALE", "SCALE", "late_two.py"),
    "a module of a package": (
        "import late_three.inner.scale as s", "s.SCALE", "late_three/inner/scale.py"
    ),
    "from a package": ("from late_four import scale", "scale.SCALE", "late_four/scale.py"),
    "through another module": ("from late_five import up", "up.SCALE", "late_five/scale.py"),
}  # fmt: skip


@pytest.mark.parametrize("case", LATE_IMPORTS)
def test_a_module_from_elsewhere_that_a_function_imports_is_in_the_digest(
    case, tmp_path, monkeypatch
):
    statement, name, path = LATE_IMPORTS[case]
    folder, other = tmp_path / "run", tmp_path / "elsewhere"
    folder.mkdir()
    file = other / path
    file.parent.mkdir(parents=True)
    (file.parent / "__init__.py").touch()
    (file.parent / "up.py").write_text("def at_once():\n    from .scale import SCALE\n")
    monkeypatch.syspath_prepend(other)
    (folder / "definition.py").write_text(DEFINITION + LATE.format(statement=statement, name=name))
    digests = []
    for text in (MODULE, "SCALE = 4.0\n", MODULE):
        file.write_text(text)
        digests.append(load_definition(folder / "definition.py").digest)
    assert digests[0] == digests[2] != digests[1]
    assert path.partition("/")[0].removesuffix(".py") not in sys.modules  # reading imports nothing


@pytest.mark.parametrize("packages", ["lib/site-packages", "lib/dist-packages"])
def test_installed_packages_of_another_environment_are_not_read(packages, tmp_path, monkeypatch):
    """PYTHONPATH may name them. Their text may be that of torch: half a minute in each command."""
    other = tmp_path / packages
    other.mkdir(parents=True)
    (other / "late_installed.py").write_text(MODULE)
    monkeypatch.syspath_prepend(other)
    text = LATE.format(statement="import late_installed", name="late_installed.SCALE")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "definition.py").write_text(DEFINITION + text)
    definition = load_definition(tmp_path / "run" / "definition.py")
    assert not definition.late


def test_scores_follow_a_module_from_elsewhere(make_run, tmp_path, influence, monkeypatch):
    text = LATE.format(statement="import late_elsewhere", name="late_elsewhere.SCALE")
    run, other = make_run("run", DEFINITION + text), tmp_path / "elsewhere"
    other.mkdir()
    monkeypatch.syspath_prepend(other)
    (other / "late_elsewhere.py").write_text(MODULE)
    assert influence("score", run, "--queries", "0").code == 0
    sys.modules.pop("late_elsewhere")
    (other / "late_elsewhere.py").write_text("SCALE = 4.0  # of another size\n")
    refused(influence("score", run, "--queries", "0"), 1, "belongs to another run")
    sys.modules.pop("late_elsewhere", None)


def test_a_module_that_nobody_imports_may_change(make_run, influence):
    definition = (
        DEFINITION
        + """

_train_data = train_data


def train_data():
    from pathlib import Path

    Path(__file__).with_name("unused.py").write_text("x = 2\\n")
    return _train_data()
"""
    )
    run = make_run("run", definition)
    (run / "unused.py").write_text("x = 1\n")
    assert influence("score", run).code == 0
    assert Path(run / "unused.py").read_text() == "x = 2\n"
