"""What the tools share: errors in one line, and names of files."""

import functools
import hashlib
import re
import sys
from collections.abc import Callable

import data


def tool(name: str, bad_data: int = 2) -> Callable:
    """A decorator for `main(words)`: wrong flags, files and data are one line and a status, as is Ctrl-C."""

    def decorate(main):
        @functools.wraps(main)
        def run(words: list[str] | None = None) -> int:
            data.escape_output()
            try:
                return main(words) or 0
            except (data.UsageError, data.DataError, OSError) as error:
                print(f"{name}: {error}", file=sys.stderr)
                return bad_data if isinstance(error, data.DataError) else 2
            except KeyboardInterrupt:
                print(f"{name}: interrupted", file=sys.stderr)
                return 130

        return run

    return decorate


def file_name(*words: str) -> str:
    """A name that any file system takes, and another one for other words: their beginning and a checksum."""
    readable = re.sub(r"\W+", "-", " ".join(words), flags=re.ASCII)[:60].strip("-")
    return f"{readable}-{hashlib.sha256(ascii(words).encode()).hexdigest()[:8]}"
