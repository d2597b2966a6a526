"""The command line, one module per command.

Each command module has `add_arguments(parser)` and `run(args) -> exit code`. `main` says what each does, and imports only the one that is asked for.
"""
