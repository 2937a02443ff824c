"""What a user did wrong, said so that it can be mended: where, what was expected, what was found, what to do."""

import difflib
from collections.abc import Iterable

LOST_PEER = (
    "another process of the run ended or cannot be reached; what it said tells why; go on from the last checkpoint "
    "with --resume auto"
)


class UserError(ValueError):
    """A mistake in a configuration, a file or a call; its message is all that the user needs to see.

    The command line prints it without a traceback and exits with 2. A bug is any other exception.
    """


def did_you_mean(name: str, options: Iterable[str], num_nearest: int = 3, cutoff: float = 0.5) -> str:
    """Return `"did you mean 'a' or 'b'?"` for the options nearest to `name`, or the list of all of them.

    Args:
        name: What was written.
        options: What could have been written.
        num_nearest: How many suggestions at most.
        cutoff: How alike they are at least, of 1.
    """
    known = sorted(set(options))
    nearest = difflib.get_close_matches(name, known, n=num_nearest, cutoff=cutoff)
    if nearest:
        return f"did you mean {' or '.join(repr(option) for option in nearest)}?"
    if len(known) > 20:
        return f"no name that is known here is near it, of {len(known)}"
    return f"valid: {', '.join(known)}" if known else "nothing is valid here"
