"""Each kind of task: the losses of a padded batch are the model's own losses of its examples alone; labels and texts
as people know them; and what is missing is named."""

import json

import pytest
import torch

from influence_cli.errors import DataError, DefinitionError
from influence_cli.huggingface import Task
from tests.integrations import hf_runs

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
VOCABULARY = len(hf_runs.SPECIAL + hf_runs.WORDS)
TEXTS = ["a dog sings", "the cat sleeps outside here", "nobody sings"]


def bert(head, **options):
    def make():
        import transformers

        return getattr(transformers, f"BertFor{head}")(hf_runs.bert_config(**options))

    return make


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, pad_token_id=0, eos_token_id=3, decoder_start_token_id=0, initializer_factor=3.0)
    )  # fmt: skip


def bart():
    from transformers import BartConfig, BartForConditionalGeneration

    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=VOCABULARY, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=32,
            pad_token_id=0, bos_token_id=2, eos_token_id=3, decoder_start_token_id=2, forced_eos_token_id=None, init_std=0.2,
        )
    )  # fmt: skip


def gpt2_classifier():
    from transformers import GPT2Config, GPT2ForSequenceClassification

    return GPT2ForSequenceClassification(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=16,
            n_layer=1,
            n_head=2,
            n_positions=32,
            num_labels=3,
            initializer_range=0.2,
            pad_token_id=None,
            eos_token_id=3,
        )
    )


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            num_key_value_heads=1,
            max_position_embeddings=64,
            initializer_range=0.2,
            **SMALL,
        )
    )


CLASSES = [{"text": text, "label": i} for i, text in enumerate(TEXTS)]
VALUES = [{"text": text, "label": f"{i / 3:.3f}"} for i, text in enumerate(TEXTS)]
SETS = [
    {"text": text, "label": label}
    for text, label in zip(TEXTS, ([0, 2], [1, 0, 1], []), strict=True)
]
TAGGED = [
    {"tokens": text.split(), "ner_tags": [i % 3 for i in range(len(text.split()))]}
    for text in TEXTS
]
PAIRS = [{"source": text, "target": text[::-1].replace("god", "dog") + " music"} for text in TEXTS]
PLAIN = [{"text": text} for text in TEXTS]
CASES = {
    "classes": (bert("SequenceClassification", num_labels=3), "sequence-classification", CLASSES, {"text": ["text"], "label": "label"}),
    "regression": (bert("SequenceClassification", num_labels=1), "sequence-classification", VALUES, {"text": ["text"], "label": "label"}),
    "sets of classes": (bert("SequenceClassification", num_labels=3, problem_type="multi_label_classification"), "sequence-classification", SETS, {"text": ["text"], "label": "label"}),
    "decoder as classifier": (gpt2_classifier, "sequence-classification", CLASSES, {"text": ["text"], "label": "label"}),
    "tags": (bert("TokenClassification", num_labels=3), "token-classification", TAGGED, {"text": ["tokens"], "label": "ner_tags"}),
    "masked words": (bert("MaskedLM"), "masked-lm", PLAIN, {"text": ["text"], "mask_probability": 0.4}),
    "next words": (llama, "causal-lm", PLAIN, {"text": ["text"]}),
    "prompts": (llama, "causal-lm", [{"prompt": text, "completion": " loud music"} for text in TEXTS], {"text": ["prompt", "completion"], "end_of_text": True}),
    "t5": (t5, "seq2seq-lm", PAIRS, {"text": ["source", "target"]}),
    "bart": (bart, "seq2seq-lm", PAIRS, {"text": ["source", "target"]}),
}  # fmt: skip
FACTORS = {
    "causal-lm": 1,
    "seq2seq-lm": 0,
    "masked-lm": 0,
}  # of token sums: positions that predict nothing


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("models")

    def save(name: str):
        folder = place / name
        if not folder.exists():
            torch.manual_seed(0)
            CASES[name][0]().save_pretrained(folder)
            hf_runs.word_tokenizer(
                pair=CASES[name][1] in ("token-classification", "masked-lm"), eos_token="[SEP]"
            ).save_pretrained(folder)
        return folder

    return save


def open_task(folders, name: str, **options):
    _, kind, rows, columns = CASES[name]
    task = Task(kind, folders(name), **columns, **options)
    torch.manual_seed(1)
    model = task.model()
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return task, model.eval(), rows


@pytest.mark.parametrize("name", CASES)
def test_losses_of_a_padded_batch_are_the_models_own_losses_alone(name, folders):
    task, model, rows = open_task(folders, name)
    examples = [task.example(row) for row in rows]
    batch = task.collate(examples)
    losses = task.loss(model, batch)
    assert losses.shape == (3,)
    for example, loss in zip(examples, losses, strict=True):
        inputs = {
            key: value[None] for key, value in example.items() if isinstance(value, torch.Tensor)
        }
        own = model(**inputs).loss
        if task.kind in FACTORS:
            own = own * (inputs["labels"][:, FACTORS[task.kind] :] != -100).sum()
        assert torch.allclose(loss, own, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["next words", "t5", "masked words", "tags"])
def test_normalised_by_example_the_loss_is_a_mean_over_tokens(name, folders):
    task, model, rows = open_task(folders, name, normalise="example")
    example = task.example(rows[1])
    inputs = {key: value[None] for key, value in example.items() if isinstance(value, torch.Tensor)}
    assert torch.allclose(
        task.loss(model, task.collate([example]))[0], model(**inputs).loss, rtol=1e-5
    )


@pytest.mark.parametrize("name", ["next words", "prompts", "masked words", "tags"])
def test_drawn_labels_follow_the_probabilities_of_their_positions(name, folders):
    task, model, rows = open_task(folders, name)
    batch = task.collate([task.example(rows[0])])
    outputs, draws = task.outputs(model, batch), 4000
    repeated = {key: value.expand(draws, *value.shape[1:]) for key, value in batch.items()}
    many = outputs.detach().expand(draws, *outputs.shape[1:])
    drawn = task.sample(many, repeated, torch.Generator().manual_seed(0))["labels"]
    labels, shift = batch["labels"][0], FACTORS.get(task.kind, 0)
    places = [place for place in range(shift, len(labels)) if labels[place] != -100]
    assert places
    assert torch.equal(drawn == -100, repeated["labels"] == -100)
    for place in places:
        chances = outputs[0, place - shift].softmax(0)
        shares = torch.bincount(drawn[:, place], minlength=len(chances)) / draws
        bound = 5 * (chances * (1 - chances) / draws).sqrt() + 1 / draws
        assert ((shares - chances).abs() <= bound).all(), place


def test_labels_that_the_decoder_reads_are_not_drawn(folders):
    task, model, rows = open_task(folders, "t5")
    batch = task.collate([task.example(rows[0])])
    with pytest.raises(DefinitionError, match="does not draw labels of seq2seq-lm"):
        task.sample(task.outputs(model, batch), batch, torch.Generator())


def test_only_completions_have_a_loss(folders):
    task, _, rows = open_task(folders, "prompts")
    labels = task.example(rows[1])["labels"]
    assert (labels[: len(TEXTS[1].split())] == -100).all()
    assert (labels != -100).sum() == 3  # two words and the end token


def test_masked_tokens_are_the_same_at_each_read_and_at_least_one(folders):
    task, _, _ = open_task(folders, "masked words")
    examples = [task.example({"text": text}) for text in TEXTS for _ in range(2)]
    for one, again in zip(examples[::2], examples[1::2], strict=True):
        assert torch.equal(one["input_ids"], again["input_ids"]) and torch.equal(
            one["labels"], again["labels"]
        )
        assert (one["labels"] != -100).any()
        assert (one["labels"][0], one["labels"][-1]) == (-100, -100)  # special tokens


def test_words_of_several_tokens_have_the_label_of_their_first_token(folders):
    task, _, _ = open_task(folders, "tags")
    example = task.example({"tokens": ["dog", "cat's", "sings"], "ner_tags": [2, 1, 0]})
    assert example["labels"].tolist() == [
        -100,
        2,
        1,
        *[-100] * (len(example["labels"]) - 5),
        0,
        -100,
    ]


def test_tokenised_rows_pass_every_column_and_hide_padding(folders):
    task, model, _ = open_task(folders, "classes")
    rows = [
        {"input_ids": [2, 5, 6, 3], "token_type_ids": [0, 0, 1, 1], "label": 1},
        {"input_ids": [2, 7, 3], "token_type_ids": [0, 1, 1], "label": 0},
    ]
    examples = [task.example(row) for row in rows]
    batch = task.collate(examples)
    assert batch["attention_mask"].sum(1).tolist() == [4, 3]
    own = [
        model(
            input_ids=torch.tensor([row["input_ids"]]),
            token_type_ids=torch.tensor([row["token_type_ids"]]),
            labels=torch.tensor([row["label"]]),
        ).loss
        for row in rows
    ]
    assert torch.allclose(task.loss(model, batch), torch.stack(own), rtol=1e-5)


def test_class_names_are_labels(folders, tmp_path):
    task, _, _ = open_task(folders, "classes", label_names=["no", "maybe", "yes"])
    example = task.example({"text": "a dog", "label": "yes"})
    assert int(example["labels"]) == 2 and task.label_text(example) == "yes"
    assert task.label_text(task.relabel(example, "no")) == "no"
    assert task.label_text(task.relabel(example, 1)) == "maybe"
    assert task.label_text(task.example({"text": "a dog"})) is None
    assert task.describe(example) == "a dog"


BAD_ROWS = {
    "an unknown class": (
        {"text": "a dog", "label": "perhaps"},
        "the label 'perhaps' is no class of the model",
    ),
    "a number past the classes": (
        {"text": "a dog", "label": 3},
        "the label 3 is no class of the model",
    ),
    "no text": ({"words": "a dog", "label": 1}, "a row has no column text"),
    "an empty text": ({"text": None, "label": 1}, "column text holds a NoneType"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_row_that_does_not_fit_is_refused_by_name(name, folders):
    task, _, _ = open_task(folders, "classes")
    row, message = BAD_ROWS[name]
    with pytest.raises(DataError, match=message):
        task.example(row)


def test_a_batch_without_labels_is_refused(folders):
    task, model, _ = open_task(folders, "classes")
    with pytest.raises(DataError, match="no labels"):
        task.loss(model, task.collate([task.example({"text": "a dog"})]))


def test_a_text_that_predicts_nothing_has_the_loss_zero(folders):
    """transformers' own mean over no token is NaN."""
    task, model, _ = open_task(folders, "next words")
    batch = task.collate([task.example({"text": "dog"}), task.example({"text": "a dog"})])
    losses = task.loss(model, batch)
    assert losses[0] == 0 < losses[1]


def test_unknown_kinds_and_missing_tokenizers_are_named(folders, tmp_path):
    with pytest.raises(DefinitionError, match="summarising"):
        Task("summarising", tmp_path)
    CASES["classes"][0]().save_pretrained(tmp_path / "model")
    with pytest.raises(DefinitionError, match="no tokenizer beside the model"):
        Task("sequence-classification", tmp_path / "model", text=["text"]).example({"text": "a"})


def test_features_are_the_mean_of_the_last_hidden_states_without_padding(folders):
    task, model, rows = open_task(folders, "classes")
    examples = [task.example(row) for row in rows]
    features = task.features(model, task.collate(examples))
    alone = torch.cat([task.features(model, task.collate([example])) for example in examples])
    assert features.shape == (3, 16)
    assert torch.allclose(features, alone, atol=1e-6)


def test_no_module_of_this_package_asks_a_model_hub(tmp_path, monkeypatch):
    (tmp_path / "adapter_config.json").write_text(
        json.dumps(
            {
                "base_model_name_or_path": "nobody/nothing",
                "task_type": "SEQ_CLS",
                "peft_type": "LORA",
            }
        )
    )
    with pytest.raises(
        DefinitionError, match=r"the base model nobody/nothing of .* is not on this machine"
    ):
        Task("sequence-classification", tmp_path).model()


def test_no_padding_token_is_made_up(tmp_path):
    """A decoder classifies at the last token that is no padding: token 0 may be a word."""
    model = gpt2_classifier()
    model.config.eos_token_id = None
    model.save_pretrained(tmp_path)
    task = Task("sequence-classification", tmp_path, label="label")
    assert task.model().config.pad_token_id is None
    rows = [{"input_ids": [5, 6, 0], "label": 1}, {"input_ids": [7], "label": 0}]
    with pytest.raises(ValueError, match="no padding token"):
        task.loss(task.model(), task.collate([task.example(row) for row in rows]))
