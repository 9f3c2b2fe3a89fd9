"""What every section of a config has: options, each with the rule that its value is checked against."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from dataclasses import Field, dataclass, field, fields
from typing import Any, ClassVar, TypeVar

from ..errors import InvalidOption, unknown

S = TypeVar("S", bound="Section")

WANTED = {int: "an int", float: "a number", str: "a string", tuple: "a tuple of names", object: "texts or token ids"}


# What users have given names to, by kind and name; see `register`.
OWN: dict[str, dict[str, Any]] = {"attention": {}, "drafter": {}, "eviction": {}, "format": {}}


def option(
    default: Any, *, kind: type = str, low: float = 0, high: float = float("inf"), choices: Any = (), own: str = ""
) -> Any:
    """A dataclass field that carries the rule its value is checked against; `own` is the kind in `OWN` it takes too."""
    return field(default=default, metadata={"kind": kind, "low": low, "high": high, "choices": choices, "own": own})


class Named:
    """Base of configs: an option that does not exist is told by name, in whichever form it was given."""

    def __new__(cls, *_: Any, **options: Any) -> Any:
        """Refuse unknown options, before dataclasses do without a hint."""
        names = [each.name for each in fields(cls)]  # type: ignore[arg-type]
        for name in options:
            if name not in names:
                raise unknown(f"{cls.__name__}: option", name, names)
        return super().__new__(cls)


@dataclass(frozen=True)
class Section(Named):
    """Base of the parts' sections: validates every field when the object is made."""

    main: ClassVar[str | None] = None  # the field that a bare string sets

    def __post_init__(self) -> None:
        for each in fields(self):
            self._check(each.name, getattr(self, each.name), each.default, each.metadata)

    def _check(self, name: str, value: Any, default: Any, rule: Mapping[str, Any]) -> None:
        where = f"{type(self).__name__}({name}=...)"
        if value is None and default is None:
            return
        if rule["choices"]:
            choices = choices_of(type(self).__dataclass_fields__[name])
            if not any(value == choice and alike(value, choice) for choice in choices):
                raise unknown(f"{where}: value", value, choices)
        elif isinstance(value, bool) or not isinstance(value, (int, float) if rule["kind"] is float else rule["kind"]):
            wanted = WANTED[rule["kind"]]
            homes = self._homes(value)
            other = f" That is a value of {homes[0]}: {homes[0]}={value!r}." if homes else ""
            raise InvalidOption(f"{where} takes {wanted}, got {value!r} ({type(value).__name__}).{other}")
        elif rule["kind"] in (int, float) and not rule["low"] <= value <= rule["high"]:
            above = f" and at most {rule['high']}" if rule["high"] != float("inf") else ""
            raise InvalidOption(f"{where} must be at least {rule['low']}{above}, got {value!r}.")

    def names(self, name: str) -> bool:
        """Whether an option is another than its default."""
        value, default = getattr(self, name), type(self).__dataclass_fields__[name].default
        return value is not default and (default is None or value != default)

    @classmethod
    def _homes(cls, value: Any) -> list[str]:
        """The options that a string is a value of."""
        return [each.name for each in fields(cls) if isinstance(value, str) and value in choices_of(each)]

    @classmethod
    def parse(cls: type[S], value: Any) -> S:
        """Accept `True`, a string (the main field), a dict or an object of this class."""
        if isinstance(value, cls):
            return value
        if value is True:
            return cls()
        if isinstance(value, str) and cls.main is not None:
            homes = cls._homes(value)
            if homes and cls.main not in homes and choices_of(cls.__dataclass_fields__[cls.main]):
                raise InvalidOption(
                    f"{cls.__name__}: a string by itself is its {cls.main}, and {value!r} is a value of {homes[0]}. "
                    f"Give {{{homes[0]!r}: {value!r}}}."
                )
            if value in (each.name for each in fields(cls)):
                raise InvalidOption(
                    f"{cls.__name__}: a string by itself is its {cls.main}, and {value!r} is another option. "
                    f"Give {{{value!r}: ...}}."
                )
            value = {cls.main: value}
        if not isinstance(value, Mapping):
            forms = "True, a dict" + (f", a string ({cls.main})" if cls.main else "")
            raise InvalidOption(f"{cls.__name__} is made from {forms} or an object of that class, got {value!r}.")
        return cls(**{str(name): each for name, each in value.items()})


def choices_of(option: Field[Any]) -> tuple[Any, ...]:
    """The values that an option takes, those that users have registered too; none if it takes any of its kind."""
    return (*option.metadata["choices"], *OWN.get(option.metadata["own"], ()))


def alike(value: Any, choice: Any) -> bool:
    """Whether equal values are of one kind: to Python 4.0 is 4, and True is 1."""
    return isinstance(value, type(choice)) and isinstance(value, bool) == isinstance(choice, bool)


def short_repr(self: Any) -> str:
    """Show what differs from the default: the shortest call that rebuilds the object, but for models and texts."""
    changed = [(o, getattr(self, o.name)) for o in fields(self) if getattr(self, o.name) != o.default]
    return f"{type(self).__name__}({', '.join(f'{option.name}={_shown(option, value)}' for option, value in changed)})"


def _shown(option: Field[Any], value: Any) -> str:
    """A value as its `repr`; a calibration set or a model, which may fill pages, by its class and length."""
    if option.metadata.get("kind") is not object or (isinstance(value, str) and len(value) <= 200):
        return repr(value)
    size = f" of {len(value):,}" if isinstance(value, Sized) else ""
    return f"<{type(value).__name__}{size}>"
