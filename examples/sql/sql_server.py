"""An MCP server over stdio with one tool, `run_sql`, for one database: `python sql_server.py DATABASE`."""

from __future__ import annotations

import sys

import sql_tool
from mcp.server import MCPServer

server = MCPServer("sql")


@server.tool()
def run_sql(sql: str) -> str:
    """Run a query: its rows, or the error and the columns."""
    return sql_tool.run_sql(sys.argv[1], sql)


if __name__ == "__main__":
    server.run("stdio")
