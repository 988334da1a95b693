"""The wheel and the source distribution: what they hold, and what an installed wheel does."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email import message_from_string
from email.message import Message
from pathlib import Path

import pytest

import influence_cli
from tests.readme_table import find_difference

ROOT = Path(__file__).parents[1]
FOLDERS = ("benchmarks", "docs", "faults", "influence_cli", "sample_runs", "tests")
FILES = (
    *("CHANGELOG.md", "Dockerfile", "LICENSE", "MANIFEST.in", "Makefile", "README.md"),
    *("SECURITY.md", "constraints.txt", "mkdocs.yml", "pyproject.toml"),
)
CACHES = ("__pycache__", "*.py[cod]", ".influence", ".ipynb_checkpoints")
USER_FILE = """
from influence_cli import InfluenceError, TrajectoryRecorder, __version__, open_run

reveal_type(__version__)
reveal_type(TrajectoryRecorder.add)
reveal_type(open_run("run"))
error: InfluenceError = 1
"""
# mypy reads the package alone: to read torch takes half a minute
MYPY_OPTIONS = """
[mypy]
strict = true
follow_imports = skip
[mypy-influence_cli.*]
follow_imports = normal
"""


def run(*command: object, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [str(word) for word in command],
        cwd=folder, capture_output=True, text=True, env={**inherited, **environment},
    )  # fmt: skip


def list_files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the files of the project, without caches."""
    folder = tmp_path_factory.mktemp("build") / "checkout"
    folder.mkdir()
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns(*CACHES))
    for name in FILES:
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def distributions(checkout) -> tuple[set[str], Path, Path]:
    """The files of the checkout, the source distribution and the wheel that `build` makes of it."""
    files = list_files(checkout)
    for cache in ("influence_cli", "tests", "sample_runs/digits"):
        (checkout / cache / "__pycache__").mkdir()
        (checkout / cache / "__pycache__" / "module.cpython-311.pyc").write_bytes(b"")
    (checkout / "sample_runs" / "digits" / ".influence").mkdir()
    (checkout / "sample_runs" / "digits" / ".influence" / "store.json").write_text("{}")
    command = (sys.executable, "-m", "build", "--no-isolation", "--outdir", checkout.parent, ".")
    done = run(*command, folder=checkout)
    assert done.returncode == 0, done.stderr
    version = influence_cli.__version__
    source = checkout.parent / f"influence_cli-{version}.tar.gz"
    return files, source, checkout.parent / f"influence_cli-{version}-py3-none-any.whl"


@pytest.fixture(scope="module")
def environment(distributions, tmp_path_factory) -> Path:
    """A virtual environment with the wheel; it takes the dependencies from this environment."""
    folder = tmp_path_factory.mktemp("wheel") / "venv"
    venv.create(folder, symlinks=True)
    packages = next(folder.glob("lib/python*/site-packages"))
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = folder / "bin" / "python"
    command = (
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--no-deps",
        "--no-index",
    )
    done = run(*command, distributions[2], folder=folder)
    assert done.returncode == 0, done.stderr
    return folder


def read_metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith("/METADATA"))
        return message_from_string(archive.read(name).decode())


def test_the_wheel_holds_the_package_and_its_licence(distributions):
    files, _, wheel = distributions
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    information = f"influence_cli-{influence_cli.__version__}.dist-info/"
    records = {
        "METADATA",
        "RECORD",
        "WHEEL",
        "entry_points.txt",
        "licenses/LICENSE",
        "top_level.txt",
    }
    package = {name for name in files if name.startswith("influence_cli/")}
    assert {"influence_cli/py.typed", "influence_cli/cli/templates/classifier.py"} < package
    assert names == package | {information + name for name in records}


def test_the_source_distribution_holds_the_checkout(distributions):
    files, source, _ = distributions
    with tarfile.open(source) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert {"README.md", "tests/test_package.py", "sample_runs/digits/definition.py"} < names
    generated = {name for name in names if name.startswith("influence_cli.egg-info/")}
    assert names - generated == files | {"PKG-INFO", "setup.cfg"}
    assert source.stat().st_size < 3 << 20


def test_the_version_of_the_wheel_is_the_packages(distributions):
    assert read_metadata(distributions[2])["Version"] == influence_cli.__version__


def test_all_is_every_extra_of_a_command(distributions):
    metadata = read_metadata(distributions[2])
    assert set(metadata.get_all("Provides-Extra", [])) - {"dev", "plot", "docs", "browser", "all"} == {
        "hf", "lightning", "parquet", "report",
    }  # fmt: skip
    requirements = metadata.get_all("Requires-Dist", [])
    assert 'influence-cli[hf,lightning,parquet,report]; extra == "all"' in requirements


def test_an_installed_wheel_shows_its_version(environment, tmp_path):
    done = run(environment / "bin" / "influence", "--version", folder=tmp_path)
    assert done.stdout == f"{influence_cli.__version__}\n"


def test_an_installed_wheel_prints_the_table_of_the_readme(environment, tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)  # the wheel, not the checkout
    assert find_difference(str(environment / "bin" / "influence"), tmp_path) is None


def test_mypy_sees_the_types_of_an_installed_wheel(environment, tmp_path):
    (tmp_path / "user.py").write_text(USER_FILE)
    (tmp_path / "mypy.ini").write_text(MYPY_OPTIONS)
    python = environment / "bin" / "python"
    done = run(
        sys.executable, "-m", "mypy", "--python-executable", python, "user.py", folder=tmp_path
    )
    assert done.stdout.splitlines()[:-1] == [
        'user.py:4: note: Revealed type is "str"',
        'user.py:5: note: Revealed type is "def (self: influence_cli.run.recorder.TrajectoryRecorder, '
        'indices: Any, weights: Any | None =)"',
        'user.py:6: note: Revealed type is "influence_cli.api.influence_run.InfluenceRun"',
        'user.py:7: error: Incompatible types in assignment (expression has type "int", variable has '
        'type "InfluenceError")  [assignment]',
    ]
