"""Files with a header or an index: safetensors, index files, cache files, trainer_state.json."""

import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
from hypothesis import strategies as st

from faults.inputs.target import SilentFault, Target, expect
from faults.mutate import extreme_values, mutate_bytes, strict_json
from faults.strategies import broken_json, json_texts
from influence_cli.cache.store import check_version, columns_digest, list_units
from influence_cli.errors import InfluenceError
from influence_cli.evaluate.result_log import ResultLog
from influence_cli.extraction.memory_budget import SizeRecord
from influence_cli.extraction.revalidate import trusted_definitions
from influence_cli.run.checkpoints import Checkpoint, describe_checkpoint, list_shards
from influence_cli.run.learning_rates import NoLearningRate, weigh_checkpoints
from influence_cli.storage.safetensors_io import read_head

HEADER = (
    b'{"__metadata__":{"step":"10","learning_rate":"0.1"},'
    b'"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},'
    b'"b":{"dtype":"I64","shape":[2],"data_offsets":[24,40]},'
    b'"c":{"dtype":"BF16","shape":[4],"data_offsets":[40,48]}}'
)
BODY = bytes(48)
INDEX = (
    b'{"metadata": {"total_size": 96}, "weight_map": {"a": "m-1.safetensors", '
    b'"d": "m-2.safetensors"}}'
)
TRAINER_STATE = (
    b'{"global_step": 30, "log_history": [{"step": 10, "learning_rate": 0.1, "loss": 1.5}, '
    b'{"step": 20, "learning_rate": 0.05, "loss": NaN}, {"step": 30, "eval_loss": 2.0}]}'
)


def mutated(content: bytes) -> Callable[[random.Random], bytes]:
    return lambda rng: mutate_bytes(content, rng)


# ---------------------------------------------------------------- safetensors
def parse_header(text: bytes) -> None:
    _, entries = read_head(text, 8 + len(text), 8 + len(text) + len(BODY))
    try:
        plain = json.dumps(strict_json(text)).encode()  # safetensors does not know -0
        reference = safetensors.deserialize(len(plain).to_bytes(8, "little") + plain + BODY)
    except Exception as error:
        raise SilentFault(f"safetensors refuses: {str(error)[:40]}") from error
    expect({name for name, _ in reference} == set(entries), "other tensor names")
    for name, entry in reference:
        expect(tuple(entry["shape"]) == entries[name].shape, "another shape")


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    """Headers of a few tensors that fill the body, or miss it by one field."""
    sizes = {"F32": 4, "I64": 8, "BF16": 2, "U8": 1, "F8_E4M3": 1, "X9": 4}
    head: dict[str, Any] = {}  # Any: JSON values
    start = 0
    for name in draw(st.lists(st.text(max_size=3), max_size=4, unique=True)):
        code = draw(st.sampled_from(list(sizes)))
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        count = sizes[code]
        for length in shape:
            count *= length
        stop = start + count + draw(st.sampled_from((0, 0, 0, 0, 0, 1, -1)))
        head[name] = {"dtype": code, "shape": shape, "data_offsets": [start, stop]}
        start = stop
    if start < len(BODY):
        rest = len(BODY) - start
        head["rest"] = {"dtype": "U8", "shape": [rest], "data_offsets": [start, len(BODY)]}
    if draw(st.booleans()):
        head["__metadata__"] = draw(st.dictionaries(st.text(max_size=3), st.text(max_size=3)))
    return draw(broken_json(head))


def make_checkpoint_target(folder: Path) -> Target:
    """The metadata of a checkpoint: step and learning rate."""
    path = folder / "model-10.safetensors"

    def parse(text: bytes) -> None:
        path.write_bytes(len(text).to_bytes(8, "little") + text + BODY)
        checkpoint = describe_checkpoint(path)
        metadata = strict_json(text).get("__metadata__") or {}
        expect(str(checkpoint.step) == metadata.get("step", "10"), "another step")
        rate = metadata.get("learning_rate")
        expect(repr(checkpoint.learning_rate) == repr(rate and float(rate)), "another rate")

    def make(rng: random.Random) -> bytes:
        values = (
            "10",
            "0",
            "1e3",
            "-1",
            "9" * 30,
            "9" * 5000,
            "nan",
            "1e400",
            "",
            "٣",
            "1_0",
            " 7 ",
        )
        head = {"a": {"dtype": "U8", "shape": [48], "data_offsets": [0, 48]}}
        metadata = {
            key: rng.choice(values) for key in ("step", "learning_rate") if rng.random() < 0.7
        }
        return json.dumps({"__metadata__": metadata, **head}, ensure_ascii=False).encode()

    return Target(
        "metadata of a checkpoint", make, parse, 15, extremes=partial(extreme_values, HEADER)
    )


def make_index_target(folder: Path) -> Target:
    place = folder / "checkpoint-10"
    place.mkdir()
    for name in ("m-1.safetensors", "m-2.safetensors"):
        header = HEADER if name == "m-1.safetensors" else HEADER.replace(b'"a"', b'"d"')
        (place / name).write_bytes(len(header).to_bytes(8, "little") + header + BODY)

    def parse(text: bytes) -> None:
        (place / "model.safetensors.index.json").write_bytes(text)
        shards = list_shards(place)
        for file in shards:
            expect(file.resolve().parent == place.resolve(), "a shard outside the folder")
        named = set(strict_json(text)["weight_map"].values())
        expect({file.name for file in shards} == named, "other shards")

    return Target("index file", mutated(INDEX), parse, 15, extremes=partial(extreme_values, INDEX))


def make_trainer_target(folder: Path) -> Target:
    """trainer_state.json of a Hugging Face Trainer: the last rate up to the checkpoint's step."""
    path = folder / "trainer_state.json"
    checkpoint = Checkpoint(25, folder, (), None, path)

    def parse(text: bytes) -> None:
        path.write_bytes(text)
        (weight,) = weigh_checkpoints([checkpoint], None)
        try:
            log = strict_json(text, finite=False)["log_history"]
        except ValueError as error:
            raise SilentFault(f"a strict parser refuses: {type(error).__name__}") from error
        logged = {
            entry["step"]: entry["learning_rate"] for entry in log if "learning_rate" in entry
        }
        before = [step for step in logged if float(step) <= 25]
        expect(weight.rates == (float(logged[max(before, key=float)]),), "another rate")

    refusals = (InfluenceError, NoLearningRate)
    strategy = json_texts(TRAINER_STATE)
    return Target(
        "trainer_state.json", mutated(TRAINER_STATE), parse, 15, refusals,
        partial(extreme_values, TRAINER_STATE), strategy,
    )  # fmt: skip


# ---------------------------------------------------------------- the cache
def make_cache_targets(folder: Path) -> list[Target]:
    """The small JSON files of a cache. What is accepted says what was written."""
    columns = ["0.weight", "0.bias"]
    units = folder / columns_digest(columns, "values", "f" * 64)
    units.mkdir()
    listing = {"columns": columns, "level": "values", "definition": "f" * 64}
    (units / "000000000000-000000000512.safetensors").write_bytes(b"")

    def parse_columns(text: bytes) -> None:
        (units / "columns.json").write_bytes(text)
        for unit in list_units(units):
            expect(list(unit.columns) == columns and unit.level == "values", "other columns")

    def parse_version(text: bytes) -> None:
        path = folder / "cache.json"
        path.write_bytes(text)
        check_version(folder, path)
        content = strict_json(text)
        expect((content["format"], content["version"]) == ("influence-cache", 3), "another version")

    def parse_sizes(text: bytes) -> None:
        (folder / "sizes-train.json").write_bytes(text)
        record = SizeRecord.open(folder, "train")
        content = strict_json(text)
        for name, (kind, size) in content["forms"].items():
            expect(record.forms[name] == (kind, size), "another form")
        record.unit_examples(list(record.forms))

    def parse_agreement(text: bytes) -> None:
        (folder / "agrees.json").write_bytes(text)
        trusted = trusted_definitions(folder, "a" * 64)
        expect(trusted == {"a" * 64, *strict_json(text).get("a" * 64, [])}, "other definitions")

    sizes = {
        "forms": {"0.weight": ["factors", 80], "0.bias": ["dense", 20]},
        "batches": {"5a9c": [64, 4096]},
    }
    cases: list[tuple[str, dict, Callable[[bytes], None]]] = [
        ("columns.json", listing, parse_columns),
        ("cache.json", {"format": "influence-cache", "version": 3}, parse_version),
        ("sizes-train.json", sizes, parse_sizes),
        ("agrees.json", {"a" * 64: ["b" * 64, "c" * 64]}, parse_agreement),
    ]
    targets = []
    for name, content, parse in cases:
        text = json.dumps(content, indent=1).encode()
        targets.append(
            Target(name, mutated(text), parse, 15, extremes=partial(extreme_values, text), strategy=json_texts(text))
        )  # fmt: skip
    return targets


def make_log_target(folder: Path) -> Target:
    """The results of evaluate. A record whose checksum was lost is read like an older one."""
    path = folder / "tsloo.jsonl"
    log = ResultLog(path)
    for number in range(3):
        log.add({"step": number, "example": 7, "truth": [0.5 * number, -1e-9]})
    content = path.read_bytes()

    def parse(text: bytes) -> None:
        path.write_bytes(text)
        records = ResultLog(path).records
        lines = text[: text.rfind(b"\n") + 1].split(b"\n")[:-1]
        wanted = [strict_json(line) for line in lines]
        for record in (*wanted, *records):
            record.pop("crc32", None)
        expect(records == wanted, "other records")

    return Target(
        "results of evaluate",
        mutated(content),
        parse,
        15,
        extremes=partial(extreme_values, content),
    )


def make_targets(folder: Path) -> list[Target]:
    return [
        make_log_target(folder),
        Target(
            "safetensors header", mutated(HEADER), parse_header, 180,
            (InfluenceError, ValueError), partial(extreme_values, HEADER), headers(),
        ),
        make_checkpoint_target(folder),
        make_index_target(folder),
        make_trainer_target(folder),
        *make_cache_targets(folder),
    ]  # fmt: skip
