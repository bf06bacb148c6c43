"""The command line. Start at :mod:`weft.cli.app`, the table of commands; each imports what it needs when it runs."""
