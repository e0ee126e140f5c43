"""The tool of all agents here that call tools: run a query, and tell the model its rows or what went wrong."""

from __future__ import annotations

from database import run_query, try_query

ROWS_SHOWN = 3


def run_sql(database: str, sql: str) -> str:
    """The first rows of the query, or the error and the columns of the tables it named."""
    complaint = try_query(database, sql)
    if complaint is not None:
        return complaint
    return "rows:" + "".join(f" ( {' , '.join(map(str, row))} )" for row in run_query(database, sql)[:ROWS_SHOWN])
