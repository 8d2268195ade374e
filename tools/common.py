"""What the tools share: flags, errors in one line, names of files."""

import argparse
import functools
import hashlib
import re
import sys
from contextlib import suppress

import data


def tool(name, bad_data=2):
    """A decorator for `main(words)`: what goes wrong is one line and a status, as is Ctrl-C."""

    def decorate(main):
        @functools.wraps(main)
        def run(words=None):
            with suppress(AttributeError):  # a notebook's stdout
                sys.stdout.reconfigure(errors="backslashreplace")  # names may be no text
            try:
                return main(words) or 0
            except (data.UsageError, data.DataError, AssertionError, OSError) as error:
                print(f"{name}: {error}", file=sys.stderr)
                return bad_data if isinstance(error, data.DataError) else 2
            except KeyboardInterrupt:
                print(f"{name}: interrupted", file=sys.stderr)
                return 130

        return run

    return decorate


def make_parser(name, about):
    """A parser whose errors are one line."""
    shape = argparse.RawDescriptionHelpFormatter
    how = {"usage": argparse.SUPPRESS, "formatter_class": shape, "allow_abbrev": False}
    return argparse.ArgumentParser(name, description=about, **how)


def file_name(*words):
    """A name that any file system takes, with a checksum that keeps similar words apart."""
    readable = re.sub(r"\W+", "-", " ".join(words), flags=re.ASCII)[:60].strip("-")
    return f"{readable}-{hashlib.sha256(ascii(words).encode()).hexdigest()[:8]}"
