"""Values of options that several commands take."""

from __future__ import annotations

from overlay.cli.failure import CommandError

#: No model has as many layers.
MOST_LAYERS = 1_000


def parse_words(option: str, text: str, allowed: tuple[str, ...]) -> tuple[str, ...]:
    """Words by comma, each one of those allowed, in the order given. Raises CommandError that names the option."""
    found = tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    unknown = [word for word in found if word not in allowed]
    if unknown or not found:
        raise CommandError(f"{option}={text!r}: allowed are {', '.join(allowed)}, separated by commas")
    return found
