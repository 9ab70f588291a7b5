"""Groups of a command's options, each a dataclass: names, help, ranges and defaults are written once.

    @dataclass(frozen=True)
    class Load:
        panel: ClassVar = "Load"      # under which --help lists them
        rate: Annotated[float, typer.Option(help="Requests a second.")] = 1.0

    def bench(load: Load, seed: Annotated[int, typer.Option()] = 0): ...

    app.command()(spread(bench))      # --rate and --seed

Fields become options in their order, where the parameter stands.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from copy import copy
from typing import Annotated, Any, get_args, get_type_hints


def spread(command: Callable[..., Any]) -> Callable[..., Any]:
    """Return `command` as Typer reads it: with every field of a dataclass among its parameters as an option of its own.

    Raises:
        TypeError: two of them have one name.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {
        name: kind for name, kind in hints.items() if dataclasses.is_dataclass(kind) and name != "return"
    }
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        if parameter.name in groups:
            parameters += _options(groups[parameter.name])
        else:
            parameters.append(_keyword(parameter.name, parameter.default, hints[parameter.name]))
    names = [parameter.name for parameter in parameters]
    if twice := {name for name in names if names.count(name) > 1}:
        raise TypeError(f"{command.__name__} has several options {sorted(twice)}")

    @functools.wraps(command)
    def called(**values: Any) -> Any:
        made = {name: kind(**{each: values.pop(each) for each in _names(kind)}) for name, kind in groups.items()}
        return command(**values, **made)

    called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    called.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportAttributeAccessIssue]
    return called


def _options(group: Any) -> Iterator[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    for field in dataclasses.fields(group):
        kind, option = get_args(hints[field.name])
        option = copy(option)
        option.rich_help_panel = group.panel
        missing = field.default is dataclasses.MISSING
        yield _keyword(field.name, inspect.Parameter.empty if missing else field.default, Annotated[kind, option])


def _keyword(name: str, default: Any, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _names(group: Any) -> Iterator[str]:
    return (field.name for field in dataclasses.fields(group))
