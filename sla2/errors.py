"""The one exception type for mistakes that a user can make and mend."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """One line that names the file, the key or row, the value, and what to do about it."""


def run_main(main: Callable[[], None]) -> None:
    """Run a step's `main`; a `UserError` becomes one line on stderr and exit status 2, Ctrl-C status 130."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("stopped: finished work is kept, the same command resumes", file=sys.stderr)
        raise SystemExit(130) from None
