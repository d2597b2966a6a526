"""The command line, one module a command.

Each command module has `HELP` (one line), `add_arguments(parser)` and `run(args) -> exit code`; `main` imports it only when it is asked for.
"""
