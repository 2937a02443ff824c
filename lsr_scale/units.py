"""Numbers in the units that people read and write: bytes, durations, parameters, amounts of things."""

from lsr_scale.errors import UserError

_BINARY = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")


def byte_size(num_bytes: float) -> str:
    """Return a number of bytes in the unit that suits it, to three digits: 812 bytes, 33.4 KiB, 5.33 MiB, 28.1 GiB."""
    value, unit = float(num_bytes), 0
    while abs(value) >= 999.5 and unit < len(_BINARY) - 1:
        value, unit = value / 1024, unit + 1
    if unit == 0:
        return "1 byte" if num_bytes == 1 else f"{value:.0f} bytes"
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f} {_BINARY[unit]}"


def amount(number: int, noun: str) -> str:
    """Return a number of things, such as "1 row", "2,000 rows", "3 processes"."""
    plural = f"{noun}es" if noun.endswith(("s", "ch")) else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"


def clock(seconds: float) -> str:
    """Return a duration as 1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def parse_count(text: str, where: str) -> int:
    """Return a number of parameters as people write it: 4M, 500k, 1.5B or a plain number.

    Args:
        text: What was written.
        where: What asked for it, for the message.

    Raises:
        UserError: for anything else.
    """
    units = {"k": 10**3, "m": 10**6, "b": 10**9}
    number, unit = (text[:-1], units[text[-1].lower()]) if text[-1:].lower() in units else (text, 1)
    try:
        count = float(number.replace(",", "").replace("_", "")) * unit if text.isascii() else 0
        if 1 <= count < 1e13:
            return round(count)
    except ValueError:
        pass
    raise UserError(f"{where}: expected a number of parameters such as 4M, 500k or 2500000, got {text!r}")
