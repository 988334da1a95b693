"""A definition that was edited, and losses that do not fit its collate()."""

from tests.conftest import DEFINITION
from tests.refusals import refused, replaced
from tests.test_numbers import LOSS


def test_a_note_counts_the_checkpoints_that_were_compared(make_run, influence):
    run = make_run()
    assert influence("score", run).code == 0
    path = run / "definition.py"
    path.write_text(path.read_text() + "\n# another text\n")
    err = influence("score", run).err
    assert "again at each of 2 checkpoints: they agree, so it uses the cache" in err
    assert "they agree" not in influence("score", run).err  # the text is trusted now


def test_losses_of_a_wrong_number_are_not_blamed_on_a_short_tensor_of_collate(make_run, influence):
    # the batch holds one tensor for all examples, but no example is lost
    collate = """
def collate(items):
    x, y = torch.utils.data.default_collate(items)
    return x, y, torch.ones(1)
"""
    text = replaced(DEFINITION, (LOSS, f"{LOSS}[:1]")) + collate
    result = influence("score", make_run(definition=text))
    refused(result, 1, "loss() returned shape (1,) for a batch of 2")
    assert "collate()" not in result.err
