"""The command line: one file per command, each with `add_options(parser)` and `run(arguments)`.

`main.py` has the table of commands and starts one of them. `parser.py` builds and reads the command line. `guard.py` turns
every failure into one line and an exit code. Start with `main.py`.
"""
