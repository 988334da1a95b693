"""Small changes of a Python source, each of which a good test notices: < to <=, + to -, ...

Not changed: annotations, decorators, texts, assertions, and the arguments of errors and notes.
"""

import ast
import copy
from collections.abc import Iterator
from dataclasses import dataclass

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd, ast.LShift: ast.RShift, ast.RShift: ast.LShift,
}  # fmt: skip
FUNCTIONS = {
    "min": "max", "max": "min", "any": "all", "all": "any", "amax": "amin", "amin": "amax",
    "floor": "ceil", "ceil": "floor", "zeros": "ones", "ones": "zeros", "zeros_like": "ones_like",
    "ones_like": "zeros_like", "sorted": "list", "abs": "float", "sum": "mean", "mean": "sum",
}  # fmt: skip
SPOKEN = ("note", "report_step", "progress")  # methods whose arguments are texts


@dataclass(frozen=True)
class Mutation:
    """A change in a file: the text from `start` to `stop` (bytes of the source) becomes `after`."""

    path: str
    line: int
    kind: str
    start: int
    stop: int
    before: str
    after: str

    def apply(self, source: bytes) -> bytes:
        return source[: self.start] + self.after.encode() + source[self.stop :]

    def compiles(self, source: bytes) -> bool:
        try:
            compile(self.apply(source), self.path, "exec")
        except SyntaxError:
            return False
        return True

    def __str__(self) -> str:
        before, after = (" ".join(text.split())[:70] for text in (self.before, self.after))
        return f"{self.path}:{self.line}: {before}  ->  {after}"


def list_mutations(path: str, source: bytes) -> list[Mutation]:
    """All changes of a file, in its order. Some do not compile: a target of an assignment."""
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    mutations = []
    for node, changed, kind in changes(ast.parse(source)):
        start = starts[node.lineno - 1] + node.col_offset
        stop = starts[(node.end_lineno or 0) - 1] + (node.end_col_offset or 0)
        text = ast.unparse(changed)
        after = text if isinstance(changed, ast.stmt) else f"({text})"
        before = source[start:stop].decode()
        mutations.append(Mutation(path, node.lineno, kind, start, stop, before, after))
    return mutations


Changed = tuple[ast.expr | ast.stmt, ast.AST, str]  # the node, what takes its place, the kind


def changes(tree: ast.AST) -> Iterator[Changed]:
    """The changes below a node, outside of what is not changed."""
    for node in ast.iter_child_nodes(tree):
        if is_left_alone(node):
            continue
        if isinstance(node, ast.expr):
            yield from ((node, changed, kind) for changed, kind in expression_changes(node))
        elif isinstance(node, ast.stmt):
            yield from ((node, changed, kind) for changed, kind in statement_changes(node))
        for test in tests_of(node):
            yield test, ast.UnaryOp(ast.Not(), test), "condition"
        yield from changes(without_fixed(node))


def tests_of(node: ast.AST) -> list[ast.expr]:
    """The conditions that decide what runs."""
    if isinstance(node, ast.If | ast.While | ast.IfExp):
        return [node.test]
    return node.ifs if isinstance(node, ast.comprehension) else []


def is_left_alone(node: ast.AST) -> bool:
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return True
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):  # a docstring
        return True
    return isinstance(node, ast.Assert | ast.JoinedStr | ast.Import | ast.ImportFrom)


def without_fixed(node: ast.AST) -> ast.AST:
    """The node without its annotations, decorators, and spoken arguments. Its children are its own."""
    fixed: tuple[str, ...] = ()
    if isinstance(node, ast.FunctionDef):
        fixed = ("decorator_list", "returns")
    elif isinstance(node, ast.ClassDef):
        fixed = ("decorator_list", "bases")
    elif isinstance(node, ast.AnnAssign | ast.arg):
        fixed = ("annotation",)
    elif isinstance(node, ast.Raise) or (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in SPOKEN
    ):
        return ast.Pass()
    shallow = copy.copy(node)
    for name in fixed:
        value = getattr(shallow, name)
        setattr(shallow, name, [] if isinstance(value, list) else None)
    return shallow


def expression_changes(node: ast.expr) -> Iterator[tuple[ast.AST, str]]:
    if isinstance(node, ast.Compare):
        for at, operator in enumerate(node.ops):
            changed = copy.deepcopy(node)
            changed.ops[at] = COMPARISONS[type(operator)]()
            yield changed, "comparison"
    elif isinstance(node, ast.BoolOp):
        changed_operator = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield ast.BoolOp(changed_operator, node.values), "boolean"
    elif isinstance(node, ast.UnaryOp) and not isinstance(node.op, ast.UAdd):
        yield node.operand, "unary"
    elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        if not any(is_text(side) for side in (node.left, node.right)):
            yield ast.BinOp(node.left, OPERATORS[type(node.op)](), node.right), "arithmetic"
    elif isinstance(node, ast.Constant):
        if isinstance(node.value, bool):
            yield ast.Constant(not node.value), "constant"
        elif isinstance(node.value, int):
            yield ast.Constant(node.value + 1), "constant"
        elif isinstance(node.value, float):
            yield ast.Constant(2 * node.value or 1.0), "constant"
    elif isinstance(node, ast.Call):
        yield from call_changes(node)


def call_changes(node: ast.Call) -> Iterator[tuple[ast.AST, str]]:
    """Another function, or one keyword argument less."""
    function = node.func
    name = function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")
    if name in FUNCTIONS:
        changed = copy.deepcopy(node)
        if isinstance(changed.func, ast.Name):
            changed.func.id = FUNCTIONS[name]
        elif isinstance(changed.func, ast.Attribute):
            changed.func.attr = FUNCTIONS[name]
        yield changed, "function"
    for at, keyword in enumerate(node.keywords):
        if keyword.arg is not None:
            changed = copy.deepcopy(node)
            del changed.keywords[at]
            yield changed, "argument"


def statement_changes(node: ast.stmt) -> Iterator[tuple[ast.AST, str]]:
    if (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)) or isinstance(
        node, ast.Raise | ast.Continue
    ):
        yield ast.Pass(), "statement"
    elif isinstance(node, ast.AugAssign) and type(node.op) in OPERATORS:
        yield ast.AugAssign(node.target, OPERATORS[type(node.op)](), node.value), "arithmetic"


def is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (
        isinstance(node, ast.Constant) and isinstance(node.value, str | bytes)
    )
