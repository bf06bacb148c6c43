"""How results are shown: plain text tables for a terminal, and pages that stand by themselves in a browser.

Start at :mod:`weft.view.commands`, which the command line calls; :mod:`weft.view.tables` lays out text and
:mod:`weft.view.page` fills ``page.html``. Nothing here computes: the numbers come from :mod:`weft.measure`,
and those of quantised models (:mod:`weft.view.evidence`) from :mod:`weft.quantize`.
"""
