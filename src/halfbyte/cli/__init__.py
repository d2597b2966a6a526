"""The command line, one module a command.

Each command module has `add_arguments(parser)` and `run(args) -> exit code`. `main` says what each does, and imports only the one that is asked for.
"""
