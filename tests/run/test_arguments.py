"""A function of definition.py that does not take the documented arguments: the error shows both."""

import pytest

from tests.conftest import DEFINITION
from tests.refusals import refused, replaced
from tests.training import train

LOSS = "def loss(model, batch):"
UNREDUCED = 'return F.cross_entropy(model(batch[0]), batch[1], reduction="none")'
ADDED = {
    "measure(model)": ("measure(model, batch)", ()),
    "collate(items, size)": ("collate(items)", ()),
    "label()": ("label(example)", ()),
    "describe(example, index)": ("describe(example)", ()),
    "features(batch)": ("features(model, batch)", ("--method", "repsim")),
}


def test_a_loss_without_a_batch_is_named_with_its_line(make_run, influence):
    text = replaced(DEFINITION, (LOSS, "def loss(model):"), (UNREDUCED, "return model.loss"))
    line = 1 + text.splitlines().index("def loss(model):")
    run = make_run(definition=text)
    refused(
        influence("score", run),
        1,
        "loss() in definition.py does not take the arguments that influence passes",
        f"found:    def loss(model) at {run / 'definition.py'} line {line}",
        "expected: def loss(model, batch)",
    )


@pytest.mark.parametrize("found", ADDED)
def test_each_optional_function_is_named_with_what_it_should_take(found, make_run, influence):
    expected, flags = ADDED[found]
    run = make_run(definition=f"{DEFINITION}\n\ndef {found}:\n    return None\n")
    says = (f"found:    def {found} at", f"expected: def {expected}")
    refused(influence("score", run, *flags), 1, *says)


def test_the_outputs_of_gauss_newton_are_named(tmp_path, influence):
    run = train(tmp_path / "run")
    with (run / "definition.py").open("a") as file:
        file.write("\ndef outputs(model):\n    return 0\n\nloss_from_outputs = print\n")
    result = influence("score", run, "--method", "unroll", "--curvature", "gauss-newton")
    refused(result, 1, "found:    def outputs(model) at", "expected: def outputs(model, batch)")


def test_a_model_that_needs_an_argument_is_named(make_run, influence):
    run = make_run()
    text = replaced(DEFINITION, ("def model():", "def model(width):"))
    (run / "definition.py").write_text(text)
    refused(influence("score", run), 1, "def model(width)", "def model()")


def test_a_type_error_inside_a_loss_keeps_its_own_line(make_run, influence):
    text = replaced(DEFINITION, (UNREDUCED, "return F.cross_entropy(model(batch[0]))"))
    refused(
        influence("score", make_run(definition=text)), 1, "loss() in definition.py raised", "line"
    )
