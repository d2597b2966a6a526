"""The `halfbyte` command, which `python -m halfbyte` is too."""

import sys

from halfbyte.cli.interrupts import end_at_once, ending_at_once


def main() -> int:
    """Run the command line of this process and return its exit code; Ctrl-C is one line also before and after the command."""
    with ending_at_once():
        from halfbyte.cli.main import main as run
    try:
        return run()
    finally:
        end_at_once()


if __name__ == "__main__":
    sys.exit(main())
