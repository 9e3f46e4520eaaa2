"""Reading the fields of a request: typed, bounded, and named in errors as the caller wrote them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quire.api.errors import ApiError, echo

if TYPE_CHECKING:
    from collections.abc import Iterable

INT64_MAX = 2**63 - 1


class Fields:
    """A JSON object being read. A null counts as absent. Raises ApiError naming the field."""

    def __init__(self, values: dict[str, Any], path: str = "") -> None:
        self._values = values
        self._path = path
        self._taken: set[str] = set()

    def name(self, key: str) -> str:
        """The field's path from the top of the body: "messages[0].content"."""
        return f"{self._path}.{key}" if self._path else key

    def take(self, key: str) -> Any:
        """The value, or None."""
        self._taken.add(key)
        return self._values.get(key)

    def has(self, key: str) -> bool:
        """The field is there, null or not."""
        return key in self._values

    def rest(self) -> list[str]:
        """Fields that nobody took and that are not null."""
        return [k for k, v in self._values.items() if k not in self._taken and v is not None]

    def string(self, key: str, *, max_length: int | None = None) -> str | None:
        """A string."""
        value = self.take(key)
        if value is None:
            return None
        return text(self.name(key), value, max_length)

    def boolean(self, key: str, default: bool = False) -> bool:
        """true or false."""
        value = self.take(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise wrong_type(self.name(key), "a boolean", value)
        return value

    def integer(self, key: str, low: int | None = None, high: int | None = None) -> int | None:
        """A whole number (1e3 is one)."""
        value = self.take(key)
        return None if value is None else integer(self.name(key), value, low, high)

    def number(self, key: str) -> float | int | None:
        """A number."""
        value = self.take(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise wrong_type(self.name(key), "a number", value)
        return value

    def object(self, key: str) -> Fields | None:
        """An object."""
        value = self.take(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise wrong_type(self.name(key), "an object", value)
        return Fields(value, self.name(key))

    def array(self, key: str, *, max_length: int | None = None) -> list[Any] | None:
        """A list."""
        value = self.take(key)
        if value is None:
            return None
        if not isinstance(value, list):
            raise wrong_type(self.name(key), "an array", value)
        check_length(self.name(key), value, max_length)
        return value

    def integers(self, key: str) -> list[int] | None:
        """A list of whole numbers."""
        value = self.array(key)
        name = self.name(key)
        return value and [integer(f"{name}[{i}]", item) for i, item in enumerate(value)]

    def refuse(self, keys: Iterable[str], why: str) -> None:
        """Raise for the first of `keys` that is set."""
        for key in keys:
            if self.take(key) is not None:
                raise unsupported(self.name(key), why)


def text(name: str, value: object, max_length: int | None = None) -> str:
    """Check a string."""
    if not isinstance(value, str):
        raise wrong_type(name, "a string", value)
    if max_length is not None and len(value) > max_length:
        message = f"'{name}' has {len(value)} characters; at most {max_length} are allowed."
        raise ApiError("string_above_max_length", message, name)
    return value


def integer(name: str, value: object, low: int | None = None, high: int | None = None) -> int:
    """Check a whole number, -2**63 to 2**63 - 1 by default."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise wrong_type(name, "an integer", value)
    low = -INT64_MAX - 1 if low is None else low
    high = INT64_MAX if high is None else high
    if value < low:
        message = f"Invalid '{name}': {echo(value)} is below the minimum of {low}."
        raise ApiError("integer_below_min_value", message, name)
    if value > high:
        message = f"Invalid '{name}': {echo(value)} is above the maximum of {high}."
        raise ApiError("integer_above_max_value", message, name)
    return value


def check_length(name: str, values: list[Any], max_length: int | None) -> None:
    """Check a list's length."""
    if max_length is not None and len(values) > max_length:
        message = f"'{name}' has {len(values)} entries; at most {max_length} are allowed."
        raise ApiError("array_above_max_length", message, name)


def wrong_type(name: str, expected: str, value: object) -> ApiError:
    """The value is of another JSON type."""
    return ApiError("invalid_type", f"'{name}' must be {expected}, not {echo(value)}.", name)


def invalid(name: str, message: str) -> ApiError:
    """The value is of the right type and still wrong."""
    return ApiError("invalid_value", message, name)


def missing(name: str) -> ApiError:
    """A required field is absent."""
    message = f"Missing required parameter: '{name}'."
    return ApiError("missing_required_parameter", message, name)


def unsupported(name: str, why: str) -> ApiError:
    """The field asks for something this server does not do."""
    return ApiError("unsupported_parameter", f"'{name}' is not supported: {why}", name)
