"""The ranges that hyper-parameters may take, as annotated types.

A signature says `beta: Positive` and the configuration is checked against it before anything is loaded
(`align_cli.config`). Infinite and NaN values are refused everywhere.
"""

from typing import Annotated

from annotated_types import Ge, Gt, Le, Lt, MinLen

Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Fraction = Annotated[float, Ge(0), Le(1)]
BelowOne = Annotated[float, Ge(0), Lt(1)]
OpenFraction = Annotated[float, Gt(0), Lt(1)]
BelowHalf = Annotated[float, Ge(0), Lt(0.5)]
PositiveBelowHalf = Annotated[float, Gt(0), Lt(0.5)]
Count = Annotated[int, Ge(1)]
WholeNumber = Annotated[int, Ge(0)]
NotEmpty = Annotated[str, MinLen(1)]
