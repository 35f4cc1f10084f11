"""Numbers that a caller gave, checked before any work."""


def integer(name: str, value: int, low: int = 1, high: int | None = None) -> int:
    """value itself; ValueError where it is no integer (a bool is none either), or not in low … high."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        bounds = f"of at least {low}" if high is None else f"in {low} … {high}"
        raise ValueError(f"{name} must be an integer {bounds}, got {value!r}")
    return value
