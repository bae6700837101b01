"""The command line: one file per command.

`main` finds the command and runs it, `guard` turns every failure into one line and an exit code. Start with `main.py`.
"""
