"""The user's model: builds it, and lists its trained parameters by their names."""

import fnmatch
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from influence_cli.errors import DefinitionError, GradientError, UsageProblem, listed
from influence_cli.run.definition import Definition

PRECISIONS = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
WRAPPERS = ("module.", "_orig_mod.")  # DataParallel and DistributedDataParallel; torch.compile


@dataclass(frozen=True)
class Column:
    """One trained parameter. Tied names are one parameter: `name` is the first, `names` are all."""

    name: str
    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    embedding: bool  # the weight of an nn.Embedding: gradients are few rows of many
    module: str | None = None  # not the parameter but what this embedding module returns (words)

    @property
    def layer(self) -> str:
        """The module that owns it; a bare parameter of the model itself is its own layer."""
        return self.name.rpartition(".")[0] or self.name

    @property
    def numel(self) -> int:
        return int(torch.Size(self.shape).numel())


def unwrap_model(model: Any) -> Any:  # Any: whatever the user's model() returns
    """The model without DataParallel, DistributedDataParallel and torch.compile."""
    while isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel) or hasattr(
        model, "_orig_mod"
    ):
        model = getattr(model, "_orig_mod", None) or model.module
    return model


def build_model(definition: Definition) -> nn.Module:
    """The user's model in eval mode, without wrappers.

    Raises DefinitionError for a model without per-example gradients.
    """
    model = unwrap_model(definition.call("model"))
    if not isinstance(model, nn.Module):
        raise DefinitionError(
            f"model() returned a {type(model).__name__}", "expected: a torch.nn.Module"
        )
    refused = [
        f"{name or 'the model'} ({type(module).__name__}): {flag}={getattr(module, flag)}"
        for name, module in model.named_modules()
        for flag in ("max_norm", "scale_grad_by_freq")
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and getattr(module, flag)
    ]
    if refused:
        raise DefinitionError(
            "an embedding has an option under which an example has no gradient of its own",
            *refused,
            "max_norm changes the weights in the forward pass; "
            "scale_grad_by_freq couples the examples of a batch",
            "build the model without it in definition.py, if training would have been the same",
        )
    lazy = [name for name, parameter in model.named_parameters() if is_lazy(parameter)]
    lazy += [name for name, buffer in model.named_buffers() if is_lazy(buffer)]
    if lazy:
        raise DefinitionError(
            f"model() has lazy modules, whose parameters have no shape yet: {listed(lazy)}",
            "give the sizes (nn.Linear for nn.LazyLinear), or run one batch through it in model()",
        )
    meta = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if meta:
        raise DefinitionError(
            f"model() has tensors without storage (meta device): {listed(meta)}",
            "build the model on the CPU",
        )
    return model.eval()


def cast_model(model: nn.Module, precision: torch.dtype | None, device: torch.device) -> nn.Module:
    """The model on its device, in this precision. Raises GradientError if memory is too small."""
    try:
        return (
            model.to(device=device, dtype=precision)
            if precision is not None
            else model.to(device=device)
        )
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise GradientError(
            f"the model does not fit into the memory of {device}",
            str(error).partition("\n")[0],
            "--device takes another one; --precision bfloat16 halves a float32 model",
        ) from error


def list_columns(model: nn.Module) -> dict[str, Column]:
    """The trained parameters in the model's order. Raises DefinitionError where there are none."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    embeddings = {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)
    }
    trained = {
        name: Column(
            name,
            tuple(names[id(parameter)]),
            tuple(parameter.shape),
            parameter.dtype,
            id(parameter) in embeddings,
        )
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    if not trained:
        raise DefinitionError(
            "the model has no trained parameter",
            "every parameter is frozen (requires_grad=False), or there is none",
            *(
                ["an adapter is trained with PeftModel.from_pretrained(..., is_trainable=True)"]
                if hasattr(model, "peft_config")
                else []
            ),
        )
    return trained


def list_embeddings(model: nn.Module) -> dict[str, Column]:
    """The output of each nn.Embedding as a column `MODULE()`: the gradient through its input
    alone, even if its weight is tied to another layer.

    Raises DefinitionError for a padding_idx that is no token.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    outputs = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            if (
                module.padding_idx is not None
                and not 0 <= module.padding_idx < module.num_embeddings
            ):
                raise DefinitionError(
                    f"the embedding {name or 'that is the model'} "
                    f"has padding_idx {module.padding_idx}",
                    f"expected: a token id from 0 to {module.num_embeddings - 1:,}",
                )
            weight = module.weight
            outputs[f"{name}()"] = Column(
                f"{name}()", tuple(names[id(weight)]), tuple(weight.shape), weight.dtype, True, name
            )
    return outputs


def select_columns(available: dict[str, Column], globs: list[str] | None) -> dict[str, Column]:
    """`--layers`: the columns whose parameter or module names match; `!glob` excludes.

    Raises UsageProblem for a glob without a match.
    """
    if not globs:
        return available

    def matches(glob: str) -> set[str]:
        matching = set()
        for column in available.values():
            for name in column.names:
                parts = name.split(".")
                prefixes = [".".join(parts[: end + 1]) for end in range(len(parts))]
                if any(fnmatch.fnmatchcase(prefix, glob) for prefix in prefixes):
                    matching.add(column.name)
        if not matching:
            raise UsageProblem(
                f"--layers {glob!r} matches no trained parameter or module",
                f"parameters: {listed(available, 20)}",
                "`influence inspect` lists them all",
            )
        return matching

    wanted = [glob for glob in globs if not glob.startswith("!")]
    kept = set().union(*(matches(glob) for glob in wanted)) if wanted else set(available)
    kept -= set().union(*(matches(glob[1:]) for glob in globs if glob.startswith("!")))
    if not kept:
        raise UsageProblem(
            f"--layers {' '.join(globs)} leaves no parameter",
            f"parameters: {listed(available, 20)}",
        )
    return {name: column for name, column in available.items() if name in kept}
