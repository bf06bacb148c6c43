"""What each command takes, by theme. A file here imports typer alone; a command's work is imported when it runs.

:mod:`weft.cli.options` has what several commands take, :mod:`weft.cli.arguments` reads what was typed.
"""
