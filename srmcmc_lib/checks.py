"""Numbers that a caller gave, checked before any work."""

from numbers import Integral


def integer(name: str, value: int, low: int = 1, high: int | None = None) -> int:
    """value itself; ValueError where it is no integer (numpy's are, a bool is none), or not in low … high."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < low or (high is not None and value > high):
        bounds = f"of at least {low}" if high is None else f"in {low} … {high}"
        raise ValueError(f"{name} must be an integer {bounds}, got {value!r}")
    return value
