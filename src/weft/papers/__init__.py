"""What 116 papers did to weights, as cards: :mod:`weft.papers.catalogue` reads and checks them.

:mod:`weft.papers.search` finds one by problem words; :mod:`weft.papers.status` computes how far weft has each of them;
:mod:`weft.papers.text` writes cards and lists, :mod:`weft.papers.methods` the methods by goal; the command line calls
:mod:`weft.papers.commands`. ``python -m weft.papers`` rewrites ``docs/papers.md``. Nothing here imports torch or numpy.
"""

from weft.papers.catalogue import Needs, Paper, load, paper
from weft.papers.commands import methods_command, papers_command
from weft.papers.methods import methods_by_goal
from weft.papers.search import Hit, search
from weft.papers.status import Status, Study, statuses

__all__ = [
    "Hit",
    "Needs",
    "Paper",
    "Status",
    "Study",
    "load",
    "methods_by_goal",
    "methods_command",
    "paper",
    "papers_command",
    "search",
    "statuses",
]
