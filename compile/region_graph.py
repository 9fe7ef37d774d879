"""A region's graph as the passes see it: a flat FX graph, and how each of its parameters is made from the model's (floor 4)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from toka.placement import AxisPlacements


@dataclass(frozen=True)
class Recipe:
    """How one parameter of the compiled code is made, once, from parameters of the model.

    operands: each a tuple of names of the region's parameters, concatenated along dim 0. packing: the operator that makes the result of
    the constants and the operands, in this order ("toka_cpp::pack_linear"); None: there is one operand, and it is the result.
    """

    operands: tuple[tuple[str, ...], ...]
    packing: str | None = None
    constants: tuple[int, ...] = ()

    @staticmethod
    def joined(*sources: str) -> Recipe:
        """The parameters of these names, concatenated."""
        return Recipe((sources,))

    @property
    def sources(self) -> tuple[str, ...]:
        """All names, operand by operand."""
        return tuple(name for operand in self.operands for name in operand)

    @property
    def is_as_loaded(self) -> bool:
        """Whether the parameter is the model's own tensor."""
        return len(self.sources) == 1 and self.packing is None

    def renamed(self, names: Mapping[str, str]) -> Recipe:
        """The same of other parameters; names: from ours to theirs."""
        operands = tuple(tuple(names[name] for name in operand) for operand in self.operands)
        return Recipe(operands, self.packing, self.constants)


@dataclass(frozen=True)
class RowSelection:
    """Names of a region's inputs that say which rows of its hidden states matter at the end.

    index [S]: places of tokens in the batch. rows, query_start, seq_lens: the same for attention over those tokens alone, one query each
    (several may be of one row; each sees what comes before itself).
    """

    index: str
    rows: str
    query_start: str
    seq_lens: str


@dataclass
class RegionGraph:
    """What every pass takes and returns; a pass may edit it in place.

    module: flat FX graph whose placeholders are the parameters and then the inputs, each node with its fake value in meta["val"];
    returns a tuple of tensors. recipes, inputs: one entry a placeholder, in order. placements: by the region's parameter names.
    """

    name: str
    module: GraphModule
    recipes: list[Recipe]
    inputs: tuple[str, ...]
    placements: Mapping[str, AxisPlacements]
    selection: RowSelection | None = None

    @property
    def placeholders(self) -> list[Node]:
        return [node for node in self.module.graph.nodes if node.op == "placeholder"]

    def recipe_of(self, node: object) -> Recipe | None:
        """The recipe of a parameter's placeholder; None for every other node."""
        if not isinstance(node, Node) or node.op != "placeholder":
            return None
        index = self.placeholders.index(node)
        return self.recipes[index] if index < len(self.recipes) else None

    def input_node(self, name: str) -> Node:
        """The placeholder of an input."""
        return self.placeholders[len(self.recipes) + self.inputs.index(name)]

    def call(self, target: torch._ops.OpOverload, *args: Any) -> Node:
        """Add a node that calls an operator, at the graph's insertion point, with its fake value."""
        node = self.module.graph.call_function(target, args)
        node.meta["val"] = fake_result(node)
        return node

    def set_parameters(self, made: Mapping[Node, Recipe]) -> None:
        """Give parameters new recipes; nodes that are not placeholders yet must have been made by `new_parameter`."""
        for node, recipe in made.items():
            self.recipes[self.placeholders.index(node)] = recipe

    def new_parameter(self, name: str, recipe: Recipe, value: torch.Tensor) -> Node:
        """Add a parameter after the last one; value: fake tensor of its shape and dtype."""
        first_input = self.placeholders[len(self.recipes)]
        with self.module.graph.inserting_before(first_input):
            node = self.module.graph.placeholder(name)
        node.meta["val"] = value
        self.recipes.append(recipe)
        return node

    def drop_unused_parameters(self) -> None:
        """Remove the placeholders of parameters that nothing reads any more."""
        unused = [node for node in self.placeholders[: len(self.recipes)] if not node.users]
        kept = [recipe for node, recipe in zip(self.placeholders, self.recipes, strict=False) if node not in unused]
        for node in unused:
            self.module.graph.erase_node(node)
        self.recipes = kept

    def finish(self) -> RegionGraph:
        """To be returned by a pass that edited the graph: dead nodes go, the code is made anew."""
        self.module.graph.eliminate_dead_code()
        self.drop_unused_parameters()
        self.module.recompile()
        return self

    def to_text(self) -> str:
        """The graph for people and diffs: one line a node, with dtype and shape."""
        lines = [f"region {self.name}"]
        for node, recipe in zip(self.placeholders, self.recipes, strict=False):
            made = ", ".join(" ++ ".join(operand) for operand in recipe.operands)
            made += f" | {recipe.packing}{list(recipe.constants) or ''}" if recipe.packing else ""
            lines.append(f"  parameter {node.name}: {_type_of(node)} = {made}")
        for node, name in zip(self.placeholders[len(self.recipes) :], self.inputs, strict=True):
            lines.append(f"  input {node.name}: {_type_of(node)} = {name}")
        for node in self.module.graph.nodes:
            if node.op == "call_function":
                keywords = "".join(f", {name}={value}" for name, value in node.kwargs.items())
                arguments = ", ".join(str(argument) for argument in node.args)
                lines.append(f"  {node.name}: {_type_of(node)} = {node.target}({arguments}{keywords})")
            elif node.op == "output":
                lines.append(f"  return {node.args[0]}")
        return "\n".join(lines) + "\n"


def fake_result(node: Node) -> object:
    """The fake value of a call_function node, from those of its arguments."""
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda argument: argument.meta["val"])
    mode = next(value.fake_mode for value in _tensors(args) if hasattr(value, "fake_mode"))
    with mode, torch.no_grad():
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _tensors(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _type_of(node: Node) -> str:
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(str(size) for size in value.shape)}]"
    return "-" if value is None or isinstance(value, list | tuple) else str(value)
