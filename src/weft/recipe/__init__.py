"""What to do, as data: weft's recipes and mergekit's files, checked, planned from headers, carried out.

:mod:`weft.recipe.schema` has the fields, :mod:`weft.recipe.read` reads files (:mod:`weft.recipe.mergekit` translates
mergekit's), :mod:`weft.recipe.planner` turns a recipe into a plan, :mod:`weft.recipe.tokenizer` decides which embedding
row each token gets, :mod:`weft.recipe.run` is ``weft.run``.
"""
