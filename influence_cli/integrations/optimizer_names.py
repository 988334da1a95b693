"""Which parameter of a model each entry of a saved optimizer state belongs to.

A state dict of torch numbers the parameters in the order in which the optimizer got them. The order
is that of `model.parameters()`, unless the trainer makes groups: then the groups decide.
"""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from influence_cli.errors import CheckpointError
from influence_cli.integrations.saved_weights import INNER

# the rules by which a Hugging Face Trainer exempts a parameter from weight decay: transformers 5,
# and those of version 4, which knew norms by their class only
NO_DECAY_NAMES = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
BIAS = re.compile("bias")

Names = tuple[tuple[str, ...], ...]  # the parameter names of each group


@dataclass(frozen=True)
class SavedOptimizer:
    """A checked state dict. `groups`: the keys of each group's parameters. `states`: key -> state
    name -> value. `options`: of each group. `names`: of each group, where the file has them."""

    groups: tuple[tuple[int, ...], ...]
    states: Mapping[int, Mapping[str, Any]]  # Any: tensors and numbers
    options: tuple[Mapping[str, Any], ...]  # Any: torch's arguments
    names: Names | None = None

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(map(len, self.groups))


@dataclass(frozen=True)
class NameMap:
    """The parameter names of each group, and the rule that gave them."""

    names: Names
    rule: str


def map_names(
    saved: SavedOptimizer, model: nn.Module, recorded: Names | None, label: str
) -> NameMap:
    """The parameter names of each group. `recorded`: the groups of the run's trajectory.

    Raises CheckpointError where no rule fits the counts and shapes, or two rules do and differ.
    """
    parameters = dict(model.named_parameters())
    if saved.names is not None:
        candidates = [NameMap(strip_names(saved.names), "names in the file")]
    elif recorded is not None:
        candidates = [NameMap(recorded, "groups of the trajectory")]
    else:
        candidates = list(list_candidates(model, saved.sizes))
    misfits = {rule.rule: list_misfits(saved, rule.names, parameters) for rule in candidates}
    fitting = [rule for rule in candidates if not misfits[rule.rule]]
    if len({rule.names for rule in fitting}) == 1:
        return fitting[0]
    sizes = ", ".join(map(str, saved.sizes))
    if fitting:
        raise CheckpointError(
            f"{label}: two orders of the parameters fit, and they differ",
            f"found: {'; '.join(rule.rule for rule in fitting)}",
            "save the state by name: give the optimizer model.named_parameters(), or record with "
            "TrajectoryRecorder(save_optimizer=True)",
        )
    raise CheckpointError(
        f"{label} does not fit the parameters of the model in definition.py",
        f"found: groups of {sizes} parameters; the model has {len(parameters)}",
        *(f"{rule}: {lines[0]}" for rule, lines in misfits.items()),
        "the optimizer was built in another order, or definition.py builds another model",
    )


def strip_names(names: Names) -> Names:
    """The names without the prefixes of wrappers."""
    bare = tuple(tuple(INNER.sub("", name) for name in group) for group in names)
    while bare and all(name.startswith("module.") for group in bare for name in group):
        bare = tuple(tuple(name.removeprefix("module.") for name in group) for group in bare)
    return bare


def list_candidates(model: nn.Module, sizes: Sequence[int]) -> Iterator[NameMap]:
    """The usual orders, of all parameters and of the trained ones."""
    parameters = dict(model.named_parameters())
    trained = [name for name, parameter in parameters.items() if parameter.requires_grad]
    if len(sizes) == 2:
        for rule, exempt in (
            ("Trainer of transformers 5: decay, no decay", list_exempt(model, NO_DECAY_NAMES)),
            ("Trainer of transformers 4: decay, no decay", list_exempt_by_class(model)),
        ):
            decay = tuple(name for name in trained if name not in exempt)
            rest = tuple(name for name in trained if name in exempt)
            yield NameMap((decay, rest), rule)
    for rule, names in (
        ("order of model.parameters(), trained ones", trained),
        ("order of model.parameters()", list(parameters)),
    ):
        if sum(sizes) == len(names):
            starts = [sum(sizes[:number]) for number in range(len(sizes) + 1)]
            yield NameMap(
                tuple(tuple(names[start:stop]) for start, stop in itertools.pairwise(starts)),
                rule,
            )


def list_exempt(model: nn.Module, pattern: re.Pattern[str]) -> set[str]:
    """The parameters in an nn.LayerNorm, or with a name that the pattern matches."""
    norms = {name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    return {
        name
        for name, _ in model.named_parameters()
        if name.rpartition(".")[0] in norms or pattern.search(name.lower())
    }


def list_exempt_by_class(model: nn.Module) -> set[str]:
    """The parameters in a norm, by the name of its class, and all biases."""
    norms = {
        name
        for name, module in model.named_modules()
        if type(module).__name__.endswith(("RMSNorm", "LayerNorm"))
    }
    in_norms = {name for name, _ in model.named_parameters() if name.rpartition(".")[0] in norms}
    return list_exempt(model, BIAS) | in_norms


def list_misfits(
    saved: SavedOptimizer, names: Names, parameters: Mapping[str, Tensor]
) -> list[str]:
    """Lines on what does not fit: counts, unknown names, shapes of states."""
    sizes = tuple(map(len, names))
    if sizes != saved.sizes:
        return [f"it gives groups of {', '.join(map(str, sizes))} parameters"]
    lines = []
    for keys, group in zip(saved.groups, names, strict=True):
        for key, name in zip(keys, group, strict=True):
            if name not in parameters:
                lines.append(f"the model has no parameter {name}")
                continue
            shape = tuple(parameters[name].shape)
            for state, value in saved.states.get(key, {}).items():
                is_scalar = state == "step" or not isinstance(value, Tensor)
                if not is_scalar and tuple(value.shape) != shape:
                    lines.append(
                        f"{state} of {name} has the shape {tuple(value.shape)}, not {shape}"
                    )
    return lines


def describe_map(saved: SavedOptimizer, mapping: NameMap, model: nn.Module, label: str) -> str:
    """The mapping as lines: name, group, shape."""
    parameters = dict(model.named_parameters())
    count = sum(saved.sizes)
    lines = [f"{label}: {count} parameters ({mapping.rule})"]
    for number, group in enumerate(mapping.names):
        lines += [f"  {name}  group {number}  {tuple(parameters[name].shape)}" for name in group]
    return "\n".join(lines)
