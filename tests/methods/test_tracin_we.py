"""TracIn-WE against autograd at the embedding's output, one text at a time, in float64; and what word scores must satisfy."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_model
from torch import nn

from influence_cli.gradients.embedding_capture import EmbeddingCapture
from tests import reference
from tests.conftest import build_run
from tests.refusals import refused, replaced

VOCABULARY = ["[PAD]", "[CLS]", "[SEP]", *"abcdefghijk"]
DEFINITION = """
import torch
from torch import nn
from torch.nn import functional as F

WORDS = ["[PAD]", "[CLS]", "[SEP]", *"abcdefghijk"]

class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.mix, self.out = nn.Embedding(14, 6, padding_idx=0), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, ids):
        h = self.words(ids)
        h = torch.tanh(self.mix(h)) * torch.tanh(h.sum(1, keepdim=True))
        return self.out(h.mean(1))

def model():
    return Reader()

class Texts(torch.utils.data.Dataset):
    def __init__(self, seed, number):
        generator = torch.Generator().manual_seed(seed)
        self.rows = []
        for n in range(number):
            length = int(torch.randint(1, 7, (1,), generator=generator))
            words = torch.randint(3, 14, (length,), generator=generator)
            self.rows.append((torch.tensor([1, *words.tolist(), 2] + [0] * (6 - length)), n % 3))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]

def train_data():
    return Texts(0, 24)

def query_data():
    return Texts(1, 5)

def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

def token(id):
    return WORDS[id]
"""
TIED = (
    ("return self.out(h.mean(1))", "return h.mean(1) @ self.words.weight.T"),
    (
        "self.out = nn.Embedding(14, 6, padding_idx=0), nn.Linear(6, 6), nn.Linear(6, 3)",
        "= nn.Embedding(14, 6, padding_idx=0), nn.Linear(6, 6)",
    ),
)
EXACT = ("--method", "tracin-we", "--precision", "float64", "--top", "all")


@pytest.fixture
def run(make_run) -> Path:
    return make_run(definition=DEFINITION)


def scores(result) -> dict[tuple[int, int], float]:
    """(query, train) -> the score, parts summed."""
    assert result.code == 0, result.err
    found: dict[tuple[int, int], float] = {}
    for row in result.rows:
        key = int(row["query"]), int(row["train"])
        found[key] = found.get(key, 0.0) + float(row["score"])
    return found


def gradients(run: Path) -> list[tuple[torch.Tensor, torch.Tensor, float, nn.Embedding]]:
    """Per checkpoint: (N, V, d) of the training texts, of the queries, the rate, the embedding."""
    space: dict = {"__file__": str(run / "definition.py"), "__name__": "definition_of_a_test"}
    exec(compile((run / "definition.py").read_text(), "definition.py", "exec"), space)
    found = []
    for k, path in enumerate(sorted((run / "checkpoints").glob("*"))):
        model = space["model"]()
        load_model(model, str(path))
        model.double().eval()
        singles = [
            [torch.utils.data.default_collate([data[i]]) for i in range(len(data))]
            for data in (space["train_data"](), space["query_data"]())
        ]
        rows = [reference.words(model, space["loss"], batches, model.words) for batches in singles]
        found.append((rows[0], rows[1], 0.1 / (1 + k), model.words))
    return found


def expected(run: Path, similar=None, kept=None) -> dict[tuple[int, int], float]:
    """sum over checkpoints and pairs of words of rate x S(w, w') x G_w(x) . G_w'(q), all of it materialised."""
    total = torch.zeros(())
    for train, query, rate, embedding in gradients(run):
        if kept is not None:
            train, query = kept(train), kept(query)
        S = (
            torch.eye(train.shape[1], dtype=torch.float64)
            if similar is None
            else similar(embedding.weight.detach())
        )
        total = total + rate * torch.einsum("nvd,vw,qwd->qn", train, S, query)
    return {
        (q, n): float(total[q, n]) for q in range(total.shape[0]) for n in range(total.shape[1])
    }


def assert_same(found: dict, wanted: dict) -> None:
    assert found.keys() == wanted.keys()
    scale = max(map(abs, wanted.values()))
    assert scale > 0
    assert max(abs(found[key] - wanted[key]) for key in wanted) <= 1e-9 * scale


def test_scores_equal_autograd_at_the_output(run, influence):
    assert_same(scores(influence("score", run, *EXACT)), expected(run))


def test_scores_equal_embedding_only_tracin_where_nothing_is_tied(run, influence):
    ours = scores(influence("score", run, *EXACT))
    assert_same(
        ours,
        scores(
            influence("score", run, "--layers", "words", "--precision", "float64", "--top", "all")
        ),
    )


def test_with_tied_weights_only_the_input_path_counts(make_run, influence):
    run = make_run(definition=replaced(DEFINITION, *TIED))
    ours = scores(influence("score", run, *EXACT))
    assert_same(ours, expected(run))
    both = scores(
        influence("score", run, "--layers", "words", "--precision", "float64", "--top", "all")
    )
    assert max(abs(ours[key] - both[key]) for key in ours) > 0.01 * max(map(abs, ours.values()))


@pytest.mark.parametrize("top", ["3", "all"])
def test_words_sum_to_the_score_of_their_pair(top, run, influence):
    flags = (*EXACT[:-1], top)
    whole, parts = influence("score", run, *flags), influence("score", run, *flags, "--by", "word")
    assert_same(
        scores(parts), {key: value for key, value in scores(whole).items() if key in scores(parts)}
    )
    order = [tuple(row[name] for name in ("query", "kind", "rank", "train")) for row in parts.rows]
    pairs = [tuple(row[name] for name in ("query", "kind", "rank", "train")) for row in whole.rows]
    assert [key for key, _ in itertools.groupby(order)] == [
        pair for pair in pairs if pair in set(order)
    ]
    for _, group in itertools.groupby(
        parts.rows, key=lambda row: (row["query"], row["kind"], row["rank"])
    ):
        rows = list(group)
        values = [float(row["score"]) * (1 if row["kind"] == "proponent" else -1) for row in rows]
        assert values == sorted(values, reverse=True)
        assert len({row["word"] for row in rows}) == len(rows)
        assert {row["word"] for row in rows} <= set(VOCABULARY) - {"[PAD]"}


def test_a_word_that_repeats_is_summed_before_it_is_multiplied(make_run, influence):
    run = make_run(
        definition=replaced(
            DEFINITION, ("words = torch.randint(3, 14,", "words = torch.randint(3, 5,")
        )
    )
    assert_same(scores(influence("score", run, *EXACT)), expected(run))


def test_special_tokens_are_kept_dropped_or_all_there_is(run, influence):
    def of(*tokens: int):
        mask = torch.zeros(14, dtype=torch.float64)
        mask[list(tokens)] = 1
        return lambda rows: rows * mask[:, None]

    for how, tokens in (("keep", range(14)), ("drop", range(3, 14)), ("only", range(3))):
        assert_same(
            scores(influence("score", run, *EXACT, "--special-tokens", how)),
            expected(run, kept=of(*tokens)),
        )


def test_texts_without_a_common_word_meet_only_in_special_tokens(make_run, influence):
    apart = replaced(
        DEFINITION,
        (
            "words = torch.randint(3, 14, (length,)",
            "words = torch.randint(3 + 5 * seed, 8 + 6 * seed, (length,)",
        ),
    )
    run = make_run(definition=apart)
    assert all(
        value == 0
        for value in scores(influence("score", run, *EXACT, "--special-tokens", "drop")).values()
    )
    words = influence("score", run, *EXACT, "--by", "word").rows
    assert {row["word"] for row in words} == {"[CLS]", "[SEP]"}


@pytest.mark.parametrize("k", [1, 2, 4])
def test_top_words_are_each_texts_own_and_meet_by_token(k, run, influence):
    def strongest(rows: torch.Tensor) -> torch.Tensor:
        norms = rows.norm(dim=2)
        kept = torch.zeros_like(norms).scatter_(1, norms.topk(k, dim=1).indices, 1.0)
        return rows * kept[..., None]

    assert_same(
        scores(influence("score", run, *EXACT, "--top-words", k)), expected(run, kept=strongest)
    )


def test_synonyms_are_the_nearest_tokens_at_the_last_checkpoint(run, influence):
    weights = gradients(run)[-1][3].weight.detach()

    def similar(_: torch.Tensor) -> torch.Tensor:
        unit = weights / weights.norm(dim=1, keepdim=True).clamp(min=1e-30)
        cosines = (unit.float() @ unit.float().T).fill_diagonal_(-1).double()
        near = torch.zeros_like(cosines).scatter_(1, cosines.topk(2, dim=1).indices, 1.0)
        return (cosines.clamp(min=0) * near).T + torch.eye(
            14
        )  # (a training text's word, a query's word)

    found = influence("score", run, *EXACT, "--synonyms", "2")
    wanted = expected(run, similar)
    scale = max(map(abs, wanted.values()))
    assert all(
        abs(value - wanted[key]) <= 1e-6 * scale for key, value in scores(found).items()
    )  # cosines are float32
    parts = influence("score", run, *EXACT, "--synonyms", "2", "--by", "word")
    assert all(abs(value - wanted[key]) <= 1e-6 * scale for key, value in scores(parts).items())
    assert any(" ~ " in row["word"] for row in parts.rows)


def test_padding_counts_nowhere_however_it_is_told(make_run, influence):
    plain = ("nn.Embedding(14, 6, padding_idx=0)", "nn.Embedding(14, 6)")
    masked = "self.words(ids['input_ids'])"
    as_dict = (
        ("h = self.words(ids)", f"h = {masked} * ids['attention_mask'][..., None]"),
        ("return F.cross_entropy(model(batch[0]), batch[1]", "return F.cross_entropy(model(batch), batch['y']"),
        ("def token(id):", "def collate(items):\n    ids = torch.stack([ids for ids, _ in items])\n"
         "    return {'input_ids': ids, 'attention_mask': (ids != 0).long(), 'y': torch.tensor([y for _, y in items])}\n\ndef token(id):"),
    )  # fmt: skip
    by_index = make_run("a", DEFINITION)
    by_flag = make_run("b", replaced(DEFINITION, plain))
    assert_same(
        scores(influence("score", by_flag, *EXACT, "--pad-id", "0")),
        expected(by_flag, kept=lambda rows: rows * (torch.arange(14) > 0).double()[:, None]),
    )
    words = {row["word"] for row in influence("score", by_flag, *EXACT, "--by", "word").rows}
    assert "[PAD]" in words
    by_mask = make_run("c", replaced(DEFINITION, plain, *as_dict))
    for run in (by_index, by_mask):
        assert "[PAD]" not in {
            row["word"] for row in influence("score", run, *EXACT, "--by", "word").rows
        }


def test_checkpoints_sum_and_means_and_cosines_are_what_they_say(run, influence):
    whole = scores(influence("score", run, *EXACT))
    assert_same(scores(influence("score", run, *EXACT, "--by", "checkpoint")), whole)
    mean = {(0, n): sum(whole[q, n] for q in range(5)) / 5 for n in range(24)}
    summed = influence("score", run, *EXACT, "--sum-queries")
    assert_same({(0, int(row["train"])): float(row["score"]) for row in summed.rows}, mean)
    cosines = scores(influence("score", run, *EXACT, "--normalize", "--lr", "0.5"))
    wanted = dict.fromkeys(whole, 0.0)
    for train, query, _, _ in gradients(run):
        a, b = (
            rows.flatten(1) / rows.flatten(1).norm(dim=1, keepdim=True) for rows in (train, query)
        )
        for q, n in wanted:
            wanted[q, n] += 0.5 * float(b[q] @ a[n])
    assert_same(cosines, wanted)
    assert_same(
        scores(influence("score", run, *EXACT, "--normalize", "--lr", "0.5", "--by", "word")),
        wanted,
    )


def test_words_are_cached_once_and_none_gives_the_same_table(run, influence, monkeypatch):
    first = influence("score", run, "--method", "tracin-we")
    assert {row["kind"] for row in first.rows} == {"proponent", "opponent"}
    calls: list[int] = []
    original = EmbeddingCapture.visit
    monkeypatch.setattr(
        EmbeddingCapture,
        "visit",
        lambda self, *args: (calls.append(args[2]), original(self, *args))[1],
    )
    for flags in (
        [],
        ["--special-tokens", "drop"],
        ["--top-words", "2"],
        ["--synonyms", "1"],
        ["--by", "word"],
        ["--lr", "1"],
    ):
        assert influence("score", run, "--method", "tracin-we", *flags).code == 0
    assert calls == []
    assert influence("score", run, "--method", "tracin-we", "--cache", "none").out == first.out
    assert sum(calls) == 2 * (24 + 5)
    (form,) = json.loads(next((run / ".influence").rglob("sizes-train.json")).read_text())[
        "forms"
    ].values()
    assert form[0] == "postings"


def test_a_changed_definition_is_compared_before_words_are_used(run, influence):
    influence("score", run, "--method", "tracin-we")
    (run / "definition.py").write_text(DEFINITION + "\n# a remark\n")
    same = influence("score", run, "--method", "tracin-we")
    assert "them again at each of" in same.err
    (run / "definition.py").write_text(
        replaced(DEFINITION, ('batch[1], reduction="none")', 'batch[1], reduction="none") * 1.5'))
    )
    refused(influence("score", run, "--method", "tracin-we"), 1, "belongs to another run")


def test_texts_along_the_second_axis_and_two_calls_are_summed():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.out = nn.Embedding(9, 4), nn.Linear(4, 2)

        def forward(self, ids):
            both = torch.tanh(self.words(ids)) * self.words(ids.flip(0)).sum(0)
            return self.out(torch.tanh(both)).sum(0)

    torch.manual_seed(0)
    model = Twice().double().eval()
    ids = torch.randint(0, 9, (6, 5))

    def loss(model, batch):
        return model(batch).square().sum(1)

    notes: list[str] = []
    capture = EmbeddingCapture(model, loss, "words()", "words", note=notes.append)
    capture.probe(ids[:, :2], [ids[:, i : i + 1] for i in range(2)])
    found = capture(ids, lambda i: ids[:, i : i + 1], 5).forms["words()"].dense().values
    wanted = reference.words(
        model, loss, [ids[:, i : i + 1] for i in range(5)], model.words
    ).flatten(1)
    assert notes == []
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_can_not_be_batched_is_taken_one_by_one_and_said():
    model = nn.Embedding(9, 4).double().eval()
    ids = torch.randint(0, 9, (5, 6))

    def loss(model, batch):
        return torch.stack([model(row).square().sum() for row in batch]) * (
            1 if len(batch) == 1 else 2
        )

    notes: list[str] = []
    capture = EmbeddingCapture(model, loss, "()", "", note=notes.append)
    capture.probe(ids[:2], [ids[i : i + 1] for i in range(2)])
    found = capture(ids, lambda i: ids[i : i + 1], 5).forms["()"].dense().values
    torch.testing.assert_close(
        found, reference.words(model, loss, [ids[i : i + 1] for i in range(5)], model).flatten(1)
    )
    assert "one example at a time" in notes[0]


# ---------------------------------------------------------------- bad inputs
TWO = (
    ("self.mix, self.out =", "self.places, self.mix, self.out ="),
    ("padding_idx=0), nn.Linear(6, 6)", "padding_idx=0), nn.Embedding(9, 6), nn.Linear(6, 6)"),
)
MISPADDED = "reader = Reader()\n    reader.words.padding_idx = 14\n    return reader"
BAD: dict[str, tuple[tuple, tuple, int, tuple]] = {
    "several": (
        TWO,
        (),
        2,
        ("the model has 2 embeddings", "words (14, 6)", "places (9, 6)", "--embedding NAME"),
    ),
    "another": (
        TWO,
        ("--embedding", "x"),
        2,
        ("--embedding x: no such embedding", "words (14, 6)"),
    ),
    "never called": (
        TWO,
        ("--embedding", "places"),
        1,
        ("never calls the embedding places", "--embedding NAME"),
    ),
    "float ids": (
        (("words(ids)", "words(ids.float())"),),
        (),
        1,
        ("the model passes torch.float32", "to the embedding words", "whole numbers"),
    ),
    "past the vocabulary": (
        (("words(ids)", "words(ids + 9)"),),
        (),
        1,
        ("is given token", "past its vocabulary", "0 to 13"),
    ),
    "padding_idx": ((("return Reader()", MISPADDED),), (), 1, ("padding_idx 14", "0 to 13")),
    "token raises": (
        (("WORDS[id]", "WORDS[id + 99]"),),
        ("--by", "word"),
        1,
        ("token() in definition.py raised IndexError",),
    ),
    "token is no text": (
        (("return WORDS[id]", "return id"),),
        ("--by", "word"),
        1,
        ("returned a int", "expected: the token's text"),
    ),
    "no token": (
        (("def token(id)", "def other(id)"),),
        ("--special-tokens", "drop"),
        2,
        ("--special-tokens drop", "has no token(id)"),
    ),
    "pad id": ((), ("--pad-id", "14"), 2, ("--pad-id 14: no such token", "0 to 13")),
    "how special": (
        (),
        ("--special-tokens", "some"),
        2,
        ("--special-tokens some: unknown", "keep, drop, only"),
    ),
    "top words": ((), ("--top-words", "0"), 2, ("--top-words 0", "from 1")),
    "synonyms": ((), ("--synonyms", "-1"), 2, ("--synonyms -1", "from 1")),
    "layers": ((), ("--layers", "mix"), 2, ("--layers", "reads one embedding")),
    "groups": ((), ("--by", "word", "--group-by", "label"), 2, ("--by word", "--group-by")),
    "by layer": ((), ("--by", "layer"), 2, ("--by layer", "checkpoint, word")),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_inputs_say_what_is_wrong(name, make_run, influence):
    changes, flags, code, says = BAD[name]
    run = make_run(definition=replaced(DEFINITION, *changes))
    refused(influence("score", run, "--method", "tracin-we", *flags), code, *says)


def test_a_model_without_an_embedding_is_told_what_needs_none(tmp_path, influence):
    refused(
        influence("score", build_run(tmp_path / "run"), "--method", "tracin-we"),
        2,
        "no nn.Embedding",
        "--method tracin",
    )


@pytest.mark.parametrize(
    "flags", [("--by", "word"), ("--top-words", "3"), ("--embedding", "words"), ("--pad-id", "0")]
)
def test_words_are_for_the_method_that_reads_them(flags, run, influence):
    refused(influence("score", run, *flags), 2, flags[0])


def test_without_token_words_are_ids(make_run, influence):
    run = make_run(definition=replaced(DEFINITION, ("def token(id)", "def other(id)")))
    words = {row["word"] for row in influence("score", run, *EXACT, "--by", "word").rows}
    assert words <= {str(token) for token in range(1, 14)}
