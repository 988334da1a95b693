"""Tables on disk as datasets: `table("train.csv")` has `len`, `[i]` and `columns`."""

from influence_cli.integrations.tables import Table, table

__all__ = ["Table", "table"]
