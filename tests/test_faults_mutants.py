"""The mutation testing of faults/: which changes it makes, and how it judges them."""

import pytest

from faults.mutants import ROOMS, ROOT, MutantRunner, draw_mutations, read_log, run_mutants
from faults.mutations import list_mutations
from faults.suite_map import SuiteMap, read_failed, read_seconds
from faults.suite_map import test_of as context_test

SOURCE = b'''"""A docstring: 1 < 2."""

import os

LIMIT = 3


@decorated(1)
def first(a: Literal[1], b=2) -> Literal[3]:
    """1 + 1"""
    assert a < b
    if a < b and not a:
        raise ValueError(f"{a + 1} of {b}", 1)
    a += 1
    source.note("1", a + 1)
    return [x for x in min(a, -b) if x][0] + "text"
'''


def test_each_kind_of_change_is_made_once():
    changes = {(m.line, m.before, m.after) for m in list_mutations("x.py", SOURCE)}
    assert changes == {
        (5, "3", "(4)"),
        (9, "2", "(3)"),
        (12, "a < b", "(a <= b)"),
        (12, "not a", "(a)"),
        (12, "a < b and not a", "(a < b or not a)"),
        (12, "a < b and not a", "(not (a < b and (not a)))"),
        (13, 'raise ValueError(f"{a + 1} of {b}", 1)', "pass"),
        (14, "a += 1", "a -= 1"),
        (14, "1", "(2)"),
        (15, 'source.note("1", a + 1)', "pass"),
        (16, "min(a, -b)", "(max(a, -b))"),
        (16, "-b", "(b)"),
        (16, "x", "(not x)"),
        (16, "0", "(1)"),
    }


def test_a_change_touches_nothing_else():
    for mutation in list_mutations("x.py", SOURCE):
        changed = mutation.apply(SOURCE)
        assert changed.startswith(SOURCE[: mutation.start])
        assert changed.endswith(SOURCE[mutation.stop :])
        compile(changed, "x.py", "exec")


def test_a_seed_draws_the_same_mutants_of_all_rooms():
    one, two, other = (draw_mutations(ROOT, 60, seed, list(ROOMS)) for seed in (0, 0, 1))
    assert one == two != other
    assert 58 <= len(one) == len(set(one)) <= 62  # shares are rounded
    for place in ("output/", "cache/", "gradients/", "extraction/", "methods/"):
        assert any(m.path.startswith(f"influence_cli/{place}") for m in one)


# ---------------------------------------------------------------- verdicts
TINY = b"def count(n):\n    while n > 3:\n        n -= 1\n    return n + 0\n"
TEST = "from tiny.x import count\n\ndef test_count():\n    assert count(5) == 3\n    assert count(2) == 2\n"


@pytest.fixture
def runner(tmp_path):
    for name, text in {
        "tiny/__init__.py": b"",
        "tiny/x.py": TINY,
        "tests/test_tiny.py": TEST.encode(),
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text)
    test = "tests/test_tiny.py::test_count"
    suite = SuiteMap({"tiny/x.py": {line: [test] for line in (0, 2, 3, 4)}}, {test: 0.1})
    return MutantRunner(tmp_path, suite)


@pytest.mark.parametrize(
    ("after", "outcome"),
    [
        ("(n >= 3)", "killed"),
        ("(not n > 3)", "killed"),
        ("n += 1", "hang"),
        ("(n - 0)", "survived"),
    ],
)
def test_a_mutant_is_judged_by_its_tests(after, outcome, runner, monkeypatch):
    monkeypatch.setattr("faults.mutants.WAIT", -280.0 if outcome == "hang" else 4.0)  # 2 seconds
    (mutation,) = [m for m in list_mutations("tiny/x.py", TINY) if m.after == after]
    verdict = runner.judge(mutation)
    assert verdict.outcome == outcome, (runner.tree / "mutant.log").read_text()
    assert (runner.tree / "tiny/x.py").read_bytes() == TINY


def test_a_line_without_tests_is_uncovered(runner):
    mutation = list_mutations("tiny/x.py", TINY)[0]
    empty = MutantRunner(runner.tree, SuiteMap({}, {}))
    assert empty.judge(mutation).outcome == "uncovered"


def test_a_log_is_continued(runner, tmp_path, monkeypatch):
    mutations = list_mutations("tiny/x.py", TINY)[:2]
    verdicts = run_mutants(mutations, runner, tmp_path / "log")
    monkeypatch.setattr(MutantRunner, "judge", None)
    assert run_mutants(mutations, runner, tmp_path / "log") == verdicts
    assert list(read_log(tmp_path / "log")) == mutations


def test_the_survivors_of_a_log_are_judged_again(runner, tmp_path, capsys):
    mutations = list_mutations("tiny/x.py", TINY)
    first = run_mutants(mutations, MutantRunner(runner.tree, SuiteMap({}, {})), tmp_path / "log")
    assert {verdict.outcome for verdict in first} == {"uncovered"}
    second = run_mutants(mutations[:2], runner, tmp_path / "log", again=True)
    assert {verdict.outcome for verdict in second} == {"killed"}
    judged = read_log(tmp_path / "log")
    assert judged[mutations[0]].outcome == "killed"
    assert capsys.readouterr().out.count("uncovered: tiny/x.py:") == len(mutations)


def test_the_quickest_tests_of_a_line_come_first():
    tests = ["t.py::a", "t.py::b", "t.py::c", "u.py::d"]
    seconds = {"t.py::a": 3.0, "t.py::b": 1.0, "t.py::c": 5.0, "u.py::d": 0.5}
    suite = SuiteMap({"x.py": {1: tests, 0: ["u.py::d"]}}, seconds)
    assert suite.tests_of("x.py", 1, 7.0) == ["u.py::d", "t.py::b", "t.py::a"]
    assert suite.tests_of("x.py", 1, 3.0) == ["u.py::d"]  # 1.5 seconds, and 2 for another file
    assert suite.tests_of("x.py", 1, 0.1) == ["u.py::d"]
    assert suite.tests_of("x.py", 9, 1.0) == ["u.py::d"]
    assert suite.tests_of("y.py", 1, 1.0) == []


def test_a_context_names_a_test():
    context = "tests.test_faults_mutants.test_a_context_names_a_test"
    assert (
        context_test(ROOT, context) == "tests/test_faults_mutants.py::test_a_context_names_a_test"
    )
    assert context_test(ROOT, "") is None


REPORT = """<testsuites><testsuite>
<testcase classname="tests.test_faults_mutants" name="test_one[a]" time="1.5"/>
<testcase classname="tests.test_faults_mutants" name="test_one[b]" time="2"/>
<testcase classname="tests.test_faults_mutants" name="test_two" time="1"><failure/></testcase>
<testcase classname="elsewhere" name="test_three" time="1"><error/></testcase>
</testsuite></testsuites>"""


def test_a_test_that_fails_without_a_mutant_is_left_out(tmp_path):
    report = tmp_path / "junit.xml"
    report.write_text(REPORT)
    one, two = (f"tests/test_faults_mutants.py::test_{name}" for name in ("one", "two"))
    assert read_seconds(ROOT, report) == {one: 3.5, two: 1.0}
    assert read_failed(ROOT, report) == {two, None}
