"""Which tests run which line of the package, and how long each takes: by the suite under coverage."""

import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

FILE_SECONDS = 1.0  # to import a file of tests
CONFIGURATION = """
[run]
source_pkgs = influence_cli
parallel = true
dynamic_context = test_function
relative_files = true
data_file = {data}
"""


@dataclass(frozen=True)
class SuiteMap:
    """`lines`: file -> line -> tests; line 0: all tests that run a line of the file.

    `seconds`: of each test. A test is tests/test_x.py::test_y, with all its parameters.
    """

    lines: dict[str, dict[int, list[str]]]
    seconds: dict[str, float]

    def tests_of(self, path: str, line: int, budget: float) -> list[str]:
        """The tests that run a line, quickest first, together at most `budget` seconds; one at least.

        Each file of tests costs FILE_SECONDS, once. A line that only an import runs (a constant)
        belongs to all tests of its file.
        """
        of_file = self.lines.get(path, {})
        tests = of_file.get(line) or of_file.get(0, [])
        ordered = sorted(tests, key=lambda test: (self.seconds.get(test, 1.0), test))
        files: set[str] = set()
        chosen: list[str] = []
        total = 0.0
        for test in ordered:
            file = test.partition("::")[0]
            cost = self.seconds.get(test, 1.0) + FILE_SECONDS * (file not in files)
            if chosen and total + cost > budget:
                continue
            files.add(file)
            chosen.append(test)
            total += cost
        return chosen

    def save(self, path: Path) -> None:
        path.write_text(json.dumps({"lines": self.lines, "seconds": self.seconds}))

    @classmethod
    def load(cls, path: Path) -> "SuiteMap":
        content = json.loads(path.read_text())
        lines = {
            name: {int(line): tests for line, tests in of_file.items()}
            for name, of_file in content["lines"].items()
        }
        return cls(lines, content["seconds"])


def build_map(tree: Path) -> SuiteMap:
    """Run the suite of a tree. It takes a few minutes."""
    with tempfile.TemporaryDirectory() as folder:
        data, report, settings = (Path(folder) / name for name in ("data", "junit.xml", "rc"))
        settings.write_text(CONFIGURATION.format(data=data))
        run = [sys.executable, "-m", "coverage", "run", f"--rcfile={settings}", "-m", "pytest"]
        subprocess.run([*run, f"--junitxml={report}"], cwd=tree, check=False)
        return read_map(tree, sorted(Path(folder).glob("data.*")), report)


def read_map(tree: Path, data_files: Iterable[Path], report: Path) -> SuiteMap:
    """Tests that failed without any mutant are left out: they would fail with each."""
    from coverage import CoverageData

    failed = read_failed(tree, report)
    lines: dict[str, dict[int, set[str]]] = {}
    for path in data_files:
        data = CoverageData(str(path))
        data.read()
        for measured in data.measured_files():
            name = "influence_cli/" + measured.rpartition("influence_cli/")[2]
            of_file = lines.setdefault(name, {})
            for line, contexts in data.contexts_by_lineno(measured).items():
                tests = {test for context in contexts if (test := test_of(tree, context))} - failed
                of_file.setdefault(line, set()).update(tests)
                of_file.setdefault(0, set()).update(tests)
    listed = {
        name: {line: sorted(tests) for line, tests in of_file.items()}
        for name, of_file in lines.items()
    }
    return SuiteMap(listed, read_seconds(tree, report))


def test_of(tree: Path, context: str) -> str | None:
    """`tests.methods.test_dve.test_x` -> tests/methods/test_dve.py::test_x; None for another context."""
    module, _, function = context.rpartition(".")
    path = f"{module.replace('.', '/')}.py"
    return f"{path}::{function}" if function and (tree / path).is_file() else None


def read_failed(tree: Path, report: Path) -> set[str | None]:
    return {
        test_of_case(tree, case)
        for case in ElementTree.parse(report).iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    }


def test_of_case(tree: Path, case: ElementTree.Element) -> str | None:
    name = (case.get("name") or "").partition("[")[0]
    return test_of(tree, f"{case.get('classname')}.{name}")


def read_seconds(tree: Path, report: Path) -> dict[str, float]:
    """Of each test function, the sum over its parameters."""
    seconds: dict[str, float] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        test = test_of_case(tree, case)
        if test is not None:
            seconds[test] = seconds.get(test, 0.0) + float(case.get("time", 0))
    return seconds
