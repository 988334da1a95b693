"""--method influence with the exact Hessian or Gauss-Newton matrix, against dense inverses by numpy."""

import copy
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.func import functional_call
from torch.utils.data import default_collate

from influence_cli.preconditioners import exact_inverse, linear_solvers, training_curvature
from influence_cli.preconditioners.linear_solvers import LinearSystem, NegativeCurvature, solve_cg
from influence_cli.preconditioners.spectrum import estimate_spectrum
from tests.refusals import refused
from tests.training import DEFINITION, definition_of, train

OUTPUTS = """
def outputs(model, batch):
    return model(batch[0])

def loss_from_outputs(outputs, batch):
    return F.cross_entropy(outputs, batch[1], reduction="none")
"""
MODELS = {
    "mlp": DEFINITION + OUTPUTS,
    "logistic regression": DEFINITION.replace(
        "nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))", "nn.Linear(4, 3)"
    )
    + OUTPUTS,
}
FLAGS = ("--method", "influence", "--top", "all", "--curvature")


def flat_loss(run, quantity="loss"):
    """(theta (P,), a function of theta and one example), of the run's last checkpoint."""
    space = definition_of(run)
    model = space["model"]().eval()
    values = load_file(str(run / "checkpoints/step-000020.safetensors"))
    shapes = {name: value.shape for name, value in model.named_parameters()}
    theta = torch.cat([values[name].flatten() for name in shapes])

    def call(theta, example):
        parts = theta.split([math.prod(shape) for shape in shapes.values()])
        named = {
            name: part.view(shape)
            for (name, shape), part in zip(shapes.items(), parts, strict=True)
        }
        bound = lambda *inputs: functional_call(model, named, inputs)  # noqa: E731
        return space[quantity](bound, default_collate([example]))[0]

    return theta.detach(), call


def examples_of(run):
    space = definition_of(run)
    train, query = space["train_data"](), space["query_data"]()
    return [train[i] for i in range(len(train))], [query[i] for i in range(len(query))]


def gradients(run):
    theta, loss = flat_loss(run)
    grad = torch.func.grad(loss)
    return [torch.stack([grad(theta, example) for example in side]) for side in examples_of(run)]


def hessian(run):
    """(P, P): the mean of the Hessians of single examples."""
    theta, loss = flat_loss(run)
    train, _ = examples_of(run)
    matrices = [
        torch.autograd.functional.hessian(lambda at, example=example: loss(at, example), theta)
        for example in train
    ]
    return torch.stack(matrices).mean(0)


def gauss_newton(run):
    """(P, P): the mean of J^T S J of single examples."""
    theta, outputs = flat_loss(run, "outputs")
    space, total = definition_of(run), 0
    for example in examples_of(run)[0]:
        jacobian = torch.autograd.functional.jacobian(
            lambda at, example=example: outputs(at, example), theta
        )
        batch = default_collate([example])
        outer = torch.autograd.functional.hessian(
            lambda out, batch=batch: space["loss_from_outputs"](out[None], batch)[0],
            outputs(theta, example),
        )
        total = total + jacobian.T @ outer @ jacobian
    return total / len(examples_of(run)[0])


def expected_scores(run, matrix, damping):
    """(Q, N) by numpy's inverse."""
    train, query = gradients(run)
    inverse = np.linalg.inv(matrix.numpy() + damping * np.eye(len(matrix)))
    return torch.from_numpy(query.numpy() @ inverse @ train.numpy().T)


def scores(result, queries=5, examples=24):
    assert result.code == 0, result.err
    table = torch.zeros(queries, examples, dtype=torch.float64)
    for row in result.rows:
        table[int(row["query"]), int(row["train"])] += float(row["score"])
    return table


def distance(computed, expected):
    """The largest difference, relative to the largest score."""
    return float((computed - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("solver", ["cg", "lissa"])
@pytest.mark.parametrize("curvature", ["hessian", "gauss-newton"])
def test_scores_are_products_through_the_dense_inverse(
    model, solver, curvature, make_run, influence
):
    run = make_run("run", MODELS[model])
    matrix = hessian(run) if curvature == "hessian" else gauss_newton(run)
    expected = expected_scores(run, matrix, 0.3)
    result = influence("score", run, *FLAGS, curvature, "--solver", solver, "--damping", "0.3")
    assert distance(scores(result), expected) < (1e-8 if solver == "cg" else 1e-7)
    assert f"{solver} solved 5 queries with --damping 0.3:" in result.err


def test_the_curvatures_are_equal_only_where_outputs_are_linear(make_run):
    for name, equal in (("logistic regression", True), ("mlp", False)):
        run = make_run(name, MODELS[name])
        assert torch.allclose(hessian(run), gauss_newton(run), atol=1e-12) == equal


@pytest.mark.parametrize("solver", ["cg", "lissa"])
def test_negative_curvature_is_an_error_that_names_the_damping(solver, make_run, influence):
    run = make_run("run", MODELS["mlp"])
    least = float(torch.linalg.eigvalsh(hessian(run))[0])
    assert least < -0.01
    result = influence("score", run, *FLAGS, "hessian", "--solver", solver, "--damping", "1e-4")
    refused(
        result,
        1,
        f"--damping 0.0001 is too small: {solver} found a direction along which the curvature is -",
        "expected: a damping above",
        "--damping auto",
        "--curvature gauss-newton",
    )
    needed = float(result.err.partition("a damping above ")[2].split()[0])
    assert 1e-4 < needed <= -least * (1 + 1e-9)


def test_auto_takes_twice_the_most_negative_eigenvalue(make_run, influence):
    run = make_run("run", MODELS["mlp"])
    matrix = hessian(run)
    least = float(torch.linalg.eigvalsh(matrix)[0])
    for solver in ("cg", "lissa"):
        result = influence("score", run, *FLAGS, "hessian", "--solver", solver)
        assert distance(scores(result), expected_scores(run, matrix, -2 * least)) < 1e-6
        assert f"--damping auto: {-2 * least:.6g}, twice" in result.err


def test_auto_takes_a_hundredth_of_the_largest_eigenvalue_where_none_is_negative(
    make_run, influence
):
    run = make_run("run", MODELS["mlp"])
    matrix = gauss_newton(run)
    damping = 0.01 * float(torch.linalg.eigvalsh(matrix)[-1])
    result = influence("score", run, *FLAGS, "gauss-newton")
    assert f"--damping auto: {damping:.6g}, 1 % of the largest eigenvalue" in result.err
    assert distance(scores(result), expected_scores(run, matrix, damping)) < 1e-6


def test_the_spectrum_has_the_extreme_eigenvalues():
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(300, 300, generator=generator, dtype=torch.float64))[0]
    values = torch.linspace(0, 0.01, 300, dtype=torch.float64)
    values[:3] = torch.tensor([-0.5, 2.0, 3.0], dtype=torch.float64)
    matrix = basis @ torch.diag(values) @ basis.T
    spectrum = estimate_spectrum(lambda u: u @ matrix, 300, 1, 4, torch.device("cpu"))
    assert spectrum.largest == pytest.approx(3.0)
    assert spectrum.smallest == pytest.approx(-0.5)


RIDGE = 0.05
BINARY = """
import torch
from torch import nn
from torch.nn import functional as F

def model():
    return nn.Linear(4, 1).double()

def examples(seed, number):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(number, 4, generator=generator, dtype=torch.float64)
    noise = torch.randn(number, generator=generator, dtype=torch.float64)
    return torch.utils.data.TensorDataset(x, (x @ torch.tensor([1.0, -2, 0.5, 0]).double() + noise > 0).double())

def train_data():
    return examples(0, 100)

def query_data():
    return examples(1, 5)

def loss(model, batch):
    return F.binary_cross_entropy_with_logits(model(batch[0])[:, 0], batch[1], reduction="none")
"""


def converge(space, kept, start=None):
    """The minimum of sum over `kept` of loss / 100 + ridge / 2 |theta|^2, by LBFGS."""
    torch.manual_seed(0)
    model = space["model"]() if start is None else copy.deepcopy(start)
    x, y = space["train_data"]().tensors
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-15,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure():
        optimizer.zero_grad()
        penalty = sum(p.square().sum() for p in model.parameters()) * RIDGE / 2
        total = space["loss"](model, (x[kept], y[kept])).sum() / 100 + penalty
        total.backward()
        return total

    optimizer.step(closure)
    return model


def test_scores_predict_retraining_without_each_example(make_run, influence):
    run = make_run("run", BINARY)
    space = definition_of(run)
    full = converge(space, list(range(100)))
    save_file(dict(full.state_dict()), str(run / "checkpoints/step-000020.safetensors"))
    queries = space["query_data"]().tensors
    with torch.no_grad():
        before = space["loss"](full, queries)
        effects = [
            space["loss"](converge(space, [i for i in range(100) if i != out], full), queries)
            - before
            for out in range(100)
        ]
    result = influence("score", run, *FLAGS, "hessian", "--damping", RIDGE)
    predicted = scores(result, 5, 100) / 100
    measured = torch.stack(effects, 1)
    for query in range(5):
        assert np.corrcoef(predicted[query], measured[query])[0, 1] > 0.99
    assert 0.8 < float((predicted * measured).sum() / measured.square().sum()) < 1.2


def test_parts_groups_and_the_mean_query_agree_with_the_scores(make_run, influence):
    run = make_run("run", MODELS["mlp"])
    flags = (*FLAGS, "hessian", "--damping", "0.3")
    plain = scores(influence("score", run, *flags))
    by_layer = influence("score", run, *flags, "--by", "layer")
    assert {row["layer"] for row in by_layer.rows} == {"0", "2"}
    assert distance(scores(by_layer), plain) < 1e-12
    mean = torch.zeros(24, dtype=torch.float64)
    for row in influence("score", run, *flags, "--sum-queries").rows:
        mean[int(row["train"])] = float(row["score"])
    assert distance(mean, plain.mean(0)) < 1e-8
    labels = [example[1] for example in examples_of(run)[0]]
    for row in influence("score", run, *flags, "--group-by", "label").rows:
        members = [i for i, label in enumerate(labels) if "abc"[int(label)] == row["train"]]
        total = float(plain[int(row["query"]), members].sum())
        assert float(row["score"]) == pytest.approx(total, rel=1e-9)


def test_layers_that_are_left_out_are_fixed(make_run, influence):
    run = make_run("run", MODELS["mlp"])
    result = influence("score", run, *FLAGS, "hessian", "--damping", "0.3", "--layers", "2")
    train, query = gradients(run)
    last = slice(15, 27)
    inverse = torch.linalg.inv(hessian(run)[last, last] + 0.3 * torch.eye(12).double())
    assert distance(scores(result), query[:, last] @ inverse @ train[:, last].T) < 1e-8


def test_batches_blocks_and_the_cache_do_not_change_scores(make_run, influence, monkeypatch):
    run = make_run("run", MODELS["mlp"])
    flags = ("score", run, *FLAGS, "hessian", "--damping", "0.3")
    plain = scores(influence(*flags, "--cache", "none"))
    assert torch.equal(scores(influence(*flags)), plain)
    assert torch.equal(scores(influence(*flags)), plain)  # from kept solutions
    some = influence(*flags, "--batch-size", "7", "--cache", "none")
    assert distance(scores(some), plain) < 1e-8
    monkeypatch.setattr(training_curvature, "KEPT_BYTES", 0)
    monkeypatch.setattr(training_curvature, "MOST_ROWS", 2)
    some = influence(*flags, "--batch-size", "7", "--cache", "none")
    assert distance(scores(some), plain) < 1e-8
    one = influence(*flags, "--train", "3,5", "--cache", "none")
    assert distance(scores(one)[:, [3, 5]], plain[:, [3, 5]]) < 1e-8


def test_a_killed_solve_resumes_at_its_block(make_run, influence, monkeypatch):
    run = make_run("run", MODELS["mlp"])
    flags = ("score", run, *FLAGS, "hessian", "--damping", "0.3")
    monkeypatch.setattr(training_curvature, "MOST_ROWS", 2)
    expected = influence(*flags, "--cache", "none").out
    solved = []

    def solve_or_die(system, vectors):
        if len(solved) == 2:
            raise KeyboardInterrupt
        solved.append(len(vectors))
        return solve_cg(system, vectors)

    monkeypatch.setattr(exact_inverse, "solve_cg", solve_or_die)
    assert influence(*flags).code == 130
    assert solved == [2, 2]
    solved.clear()
    result = influence(*flags)
    assert solved == [1]
    assert result.out == expected


def test_other_weights_data_or_damping_take_no_kept_solution(make_run, influence, monkeypatch):
    run = make_run("run", MODELS["mlp"])
    flags = ("score", run, *FLAGS, "hessian")
    assert influence(*flags, "--damping", "0.3").code == 0
    assert influence(*flags, "--damping", "0.3").code == 0
    monkeypatch.setattr(exact_inverse, "solve_cg", None)  # a call would fail
    assert influence(*flags, "--damping", "0.3").code == 0
    for more in (
        ("--damping", "0.4"),
        ("--damping", "0.3", "--steps", "10"),
        ("--damping", "0.3", "--layers", "2"),
    ):
        monkeypatch.setattr(exact_inverse, "solve_cg", solve_cg)
        expected = influence(*flags, *more, "--cache", "none").out
        assert influence(*flags, *more).out == expected


def test_float32_reaches_its_tolerance(make_run, influence):
    definition = (
        MODELS["mlp"].replace(".double()", ".float()").replace("torch.float64", "torch.float32")
    )
    run = make_run("run", definition)
    result = influence("score", run, *FLAGS, "hessian", "--damping", "0.5")
    exact = influence("score", run, *FLAGS, "hessian", "--damping", "0.5", "--precision", "float64")
    assert "(limit 0.0003)" in result.err
    assert distance(scores(result), scores(exact)) < 1e-3


TIED = """
from tests.cases import CASES

model = lambda: CASES[NAME].model().double()
train_data = lambda: CASES[NAME].examples()
query_data = lambda: CASES[NAME].examples()[:2]
loss = lambda model, batch: CASES[NAME].loss(model, batch)
"""


@pytest.mark.parametrize(
    "name", ["tied", "batchnorm-eval", "reused", "encoder-layer", "padded-texts"]
)
def test_shared_weights_embeddings_and_norms_are_differentiated(name, make_run, influence):
    """H x = v - damping x, with H by differences of the gradients of the mean loss."""
    from tests.cases import CASES

    case = CASES[name]
    collate = "collate = CASES[NAME].collate\n" if name == "padded-texts" else ""
    definition = f"NAME = {name!r}\n" + TIED + collate
    run = make_run("run", definition, (20,))
    result = influence("score", run, *FLAGS, "hessian", "--damping", "500")
    computed = scores(result, 2, 5)

    torch.manual_seed(20)
    model = case.model().double().eval()
    parameters = list(model.parameters())
    batches = [case.collate([example]) for example in case.examples()]

    def gradient(which):
        total = sum(case.loss(model, batches[i]).sum() for i in which) / len(which)
        grads = torch.autograd.grad(total, parameters, allow_unused=True)
        return torch.cat(
            [
                torch.zeros_like(p).flatten() if g is None else g.flatten()
                for p, g in zip(parameters, grads, strict=True)
            ]
        )

    theta = torch.nn.utils.parameters_to_vector(parameters).detach()

    def product(u):
        ends = []
        for sign in (1, -1):
            torch.nn.utils.vector_to_parameters(theta + sign * 1e-5 * u, parameters)
            ends.append(gradient(range(5)))
        torch.nn.utils.vector_to_parameters(theta, parameters)
        return (ends[0] - ends[1]) / 2e-5 + 500 * u

    single = torch.stack([gradient([i]) for i in range(5)])
    for query in range(2):
        x, r = torch.zeros_like(theta), single[query]
        p = r
        for _ in range(200):  # conjugate gradients by hand
            if r.norm() < 1e-9 * single[query].norm():
                break
            curved = product(p)
            length = (r @ r) / (p @ curved)
            x, after = x + length * p, r - length * curved
            p, r = after + (after @ after) / (r @ r) * p, after
        assert distance(computed[query], single @ x) < 1e-5


def test_a_solver_that_does_not_converge_is_an_error(make_run, influence, monkeypatch):
    run = make_run("run", MODELS["mlp"])
    monkeypatch.setattr(linear_solvers, "MOST_ITERATIONS", {"cg": 3, "lissa": 4})
    for solver, most in (("cg", 3), ("lissa", 4)):
        refused(
            influence("score", run, *FLAGS, "hessian", "--solver", solver, "--damping", "0.3"),
            1,
            f"{solver} did not converge: relative residual ",
            f"after {most} iterations",
            "expected: 1e-08 at most",
            "a larger --damping",
        )


def test_rounding_that_stops_the_residual_is_an_error():
    """Products in float16 limit the residual far above the tolerance."""
    matrix = torch.diag(torch.logspace(0, -3, 50, dtype=torch.float64))
    system = LinearSystem(lambda u: (u @ matrix).half().double(), 1e-4, 1e-8)
    with pytest.raises(linear_solvers.GradientError, match="cg did not converge"):
        solve_cg(system, torch.ones(1, 50, dtype=torch.float64))


def test_progress_rises_with_the_digits_of_the_residual():
    calls = []
    report = exact_inverse.percent_report(lambda percent, where: calls.append(percent), 1e-8)
    for number, residual in enumerate((3.0, 1e-2, 1e-1, 1e-6, 1e-9)):
        report(number, residual)
    assert calls == [1, 24, 0, 49, 25]


def test_a_query_without_gradient_has_scores_of_0():
    system = LinearSystem(lambda u: 2 * u, 1.0, 1e-8)
    vectors = torch.tensor([[0.0, 0.0], [3.0, 6.0]], dtype=torch.float64)
    for solution in (solve_cg(system, vectors), linear_solvers.solve_lissa(system, vectors, 4.0)):
        assert torch.allclose(solution.values, vectors / 3)
    with pytest.raises(NegativeCurvature):
        solve_cg(LinearSystem(lambda u: -2 * u, 1.0, 1e-8), vectors)


def test_a_scale_that_is_too_small_is_an_error_of_lissa():
    system = LinearSystem(lambda u: 9 * u, 1.0, 1e-8)
    with pytest.raises(linear_solvers.GradientError, match="lissa diverged") as caught:
        linear_solvers.solve_lissa(system, torch.ones(1, 2, dtype=torch.float64), 4.0)
    assert "an eigenvalue of the curvature of about 9" in str(caught.value)


def test_flags_that_do_not_fit_are_refused_by_name(make_run, influence):
    run = make_run("run", DEFINITION)
    score = ("score", run, *FLAGS)
    refused(
        influence(*score, "ekfac", "--solver", "cg"),
        2,
        "--solver cg does not apply to --curvature ekfac",
    )
    refused(influence(*score, "hessian", "--solver", "lu"), 2, "--solver lu: unknown", "cg, lissa")
    refused(
        influence("score", run, "--method", "tracin", "--solver", "cg"),
        2,
        "--solver does not apply to --method tracin",
    )
    refused(
        influence(*score, "hessian", "--project", "8"),
        2,
        "--project does not apply to --curvature hessian",
    )
    refused(
        influence(*score, "hessian", "--precision", "bfloat16"),
        2,
        "--curvature hessian needs float32 or float64 products, and this run has bfloat16",
    )
    refused(influence(*score, "hessian", "--damping", "0"), 2, "--damping '0'")
    refused(influence(*score, "gauss-newton"), 1, "lacks outputs() and loss_from_outputs()")


def test_a_curvature_of_0_needs_a_damping(make_run, influence):
    definition = DEFINITION.replace(
        'F.cross_entropy(model(batch[0]), batch[1], reduction="none")', "model(batch[0]).sum(1)"
    ).replace("nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))", "nn.Linear(4, 3)")
    run = make_run("run", definition)
    refused(influence("score", run, *FLAGS, "hessian"), 1, "the curvature is 0", "--damping X")
    plain = scores(influence("score", run, "--method", "grad-dot", "--top", "all"))
    assert (
        distance(scores(influence("score", run, *FLAGS, "hessian", "--damping", "2")) * 2, plain)
        < 1e-12
    )


@pytest.mark.parametrize(
    ("command", "line"),
    [
        (("score", "--normalize"), "--normalize with --curvature hessian"),
        (("self",), "self-influence with --curvature hessian"),
        (("score", "--fisher", "true"), "--fisher true does not apply to --curvature hessian"),
    ],
    ids=str,
)
def test_what_needs_an_approximation_is_refused(command, line, tmp_path, influence):
    run = train(tmp_path / "run", every=12)
    flags = ("--method", "influence", "--curvature", "hessian")
    refused(influence(command[0], run, *flags, *command[1:]), 2, line)
