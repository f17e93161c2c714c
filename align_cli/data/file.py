"""A dataset of the user's own, in any of the schemas of `align_cli.data.schemas`: detected row by row."""

from align_cli.data.schemas import record

__all__ = ["record"]
