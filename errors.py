"""Mistakes of the user (bad path, bad flag, broken checkpoint), told in one line."""
import contextlib
import os
import sys


class UserError(Exception):
    """Something the user can mend. The message is one line: what was wrong, what was expected, what to do."""


@contextlib.contextmanager
def exit_on_user_error():
    """Turn a UserError into that one line on stderr and exit code 2; every other exception is a bug and passes."""
    try:
        yield
    except UserError as error:
        line = " ".join(str(error).split("\n"))
        print(f"{os.path.basename(sys.argv[0])}: error: {line}", file=sys.stderr)
        raise SystemExit(2) from None
