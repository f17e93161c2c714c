"""A table or figure of a paper: from a recipe's file to a verdict on each of its claims.

`recipe` is what one says, `loading` reads and checks its file, `composing` makes experiments of its runs (`shrink`
small ones), `jobs` runs them side by side, `judging` holds their figures against its claims as `claims` says, `record`
writes what was found, and `page` shows it.
"""
