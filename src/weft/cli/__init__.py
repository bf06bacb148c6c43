"""The command line. Start at :mod:`weft.cli.app`; it imports what a command needs only when the command runs."""
