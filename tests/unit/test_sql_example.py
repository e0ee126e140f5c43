"""The SQL example: its grader tells right from wrong, its queries only read, and its splits lie apart."""

from __future__ import annotations

import asyncio
import importlib
import json
import sqlite3
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "sql"
NAMES = ("database", "agent", "grade", "tasks", "prepare", "spider")


@pytest.fixture(scope="module")
def example():
    """The example's modules, imported as the example imports them itself, and gone from `sys.modules` afterwards."""
    sys.path.insert(0, str(EXAMPLE))
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})
    sys.path.remove(str(EXAMPLE))
    for name in NAMES:
        del sys.modules[name]


@pytest.fixture
def shop(example, tmp_path):
    """A database with three items."""
    path = tmp_path / "shop.sqlite"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE items (name TEXT, price REAL, stock INTEGER)")
    connection.executemany("INSERT INTO items VALUES (?, ?, ?)", [("pen", 1.1, 3), ("cup", 2.2, 3), ("hat", 3.3, 9)])
    connection.commit()
    connection.close()
    return {"database": str(path), "schema": "shop : items", "question": "?"}


@pytest.fixture(scope="module")
def splits(example, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sql")
    example.database.HERE = example.tasks.HERE = folder
    example.tasks.write_databases()
    return {split: example.tasks.make_tasks(split, each) for split, each in example.prepare.EACH.items()}


@pytest.mark.parametrize(
    ("given", "gold", "ordered", "reward"),
    [
        ("SELECT name FROM items", "SELECT name FROM items", False, 1.0),
        ("SELECT name FROM items ORDER BY price DESC", "SELECT name FROM items", False, 1.0),
        ("SELECT name FROM items ORDER BY price DESC", "SELECT name FROM items ORDER BY price", True, 0.0),
        ("SELECT name FROM items ORDER BY stock , price", "SELECT name FROM items ORDER BY price", True, 1.0),
        (
            "SELECT stock FROM items GROUP BY stock",
            "SELECT stock FROM items",
            False,
            0.0,
        ),  # how often a row comes counts
        ("SELECT price + 0.1 + 0.2 FROM items", "SELECT 0.1 + 0.2 + price FROM items", False, 1.0),
        ("SELECT name , price FROM items", "SELECT name FROM items", False, 0.0),
        ("SELECT nothing FROM items", "SELECT name FROM items", False, 0.0),
        ("", "SELECT name FROM items", False, 0.0),
        ("DROP TABLE items", "SELECT name FROM items", False, 0.0),
        (None, "SELECT name FROM items", False, 0.0),
        ({"sql": "SELECT name FROM items"}, "SELECT name FROM items", False, 0.0),
    ],
)
def test_rows_equal(example, shop, given, gold, ordered, reward):
    assert example.grade.rows_equal(shop, {"sql": gold, "ordered": ordered}, given) == reward


def test_a_failing_gold_query_is_an_error(example, shop):
    with pytest.raises(example.database.QueryError, match="no such column"):
        example.grade.rows_equal(shop, {"sql": "SELECT lost FROM items", "ordered": False}, "SELECT name FROM items")


@pytest.mark.parametrize(
    "sql",
    [
        "DELETE FROM items",
        "CREATE TABLE more ( a )",
        "ATTACH 'beside.sqlite' AS beside",
        "PRAGMA writable_schema = 1",
        "SELECT 1 ; DROP TABLE items",
        "SELECT load_extension ( 'x' )",
        "SELECT zeroblob ( 100000000 )",
        "SELECT a.name FROM items a, items b, items c, items d, items e, items f, items g, items h, items i",
        "WITH RECURSIVE n ( i ) AS ( SELECT 1 UNION ALL SELECT i + 1 FROM n ) SELECT COUNT ( * ) FROM n",
        "SELECT '\0'",
    ],
)
def test_queries_only_read_and_end(example, shop, sql):
    before = Path(shop["database"]).read_bytes()
    with pytest.raises(example.database.QueryError):
        example.database.run_query(shop["database"], sql, seconds=0.2)
    assert Path(shop["database"]).read_bytes() == before
    assert [path.name for path in Path(shop["database"]).parent.iterdir()] == ["shop.sqlite"]


def test_splits_share_no_query_and_no_database(splits):
    assert len(splits["test"]) >= 200
    for asked in ("validation", "test"):
        for key in ("sql", "guess"):
            seen = {row["private"][key] for split, rows in splits.items() if split != asked for row in rows}
            assert not seen & {row["private"][key] for row in splits[asked]}
        files = {row["input"]["database"] for split, rows in splits.items() if split != asked for row in rows}
        assert not files & {row["input"]["database"] for row in splits[asked]}


def test_the_test_split_is_balanced_and_every_gold_query_is_right(example, splits):
    counts = Counter((row["input"]["schema"], row["private"]["kind"]) for row in splits["test"])
    assert len(counts) == 4 * len(example.tasks.KINDS)
    assert set(counts.values()) == {example.prepare.EACH["test"]}
    for row in splits["test"]:
        assert example.grade.rows_equal(row["input"], row["private"], row["private"]["sql"]) == 1.0
        assert row["private"]["ordered"] == ("ORDER BY" in row["private"]["sql"])
        assert "sql" not in row["input"]


def test_tasks_are_the_same_each_time(example, splits):
    assert example.tasks.make_tasks("test", example.prepare.EACH["test"]) == splits["test"]


def test_what_the_model_wrote_comes_back_as_the_tokens_it_wrote(example, splits):
    talks = [example.prepare.demonstrate(row) for rows in splits.values() for row in rows]
    tokenizer = example.prepare.make_tokenizer([message for talk in talks[:4000] for message in talk])
    assert len(tokenizer) < 1000
    for talk in talks:
        ids, labels = example.prepare.encode(tokenizer, talk)
        assert len(ids) == len(labels) < 200
    specials = len(example.prepare.SPECIAL)
    written = [list(range(start, min(start + 40, len(tokenizer)))) for start in range(specials, len(tokenizer), 40)]
    for ids in written:  # every token, beside tokens it never stands beside in a query
        assert tokenizer.encode(tokenizer.decode(ids), add_special_tokens=False) == ids
    unknown = tokenizer.unk_token_id
    assert all(unknown not in example.prepare.encode(tokenizer, talk)[0] for talk in talks)


class Replies:
    """An endpoint on this machine that gives the replies it was made with, one after the other, and keeps the requests."""

    def __init__(self, *replies: str) -> None:
        self.replies, self.requests = list(replies), []

    async def __aenter__(self) -> SimpleNamespace:
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        port = self.server.sockets[0].getsockname()[1]
        return SimpleNamespace(base_url=f"http://127.0.0.1:{port}/v1", api_key="key", model="policy")

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readuntil(b"\r\n\r\n"):
            length = next(
                int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")
            )
            self.requests.append(json.loads(await reader.readexactly(length)))
            message = {"role": "assistant", "content": self.replies.pop(0)}
            choice = {"index": 0, "finish_reason": "stop", "message": message}
            reply = {"id": "1", "object": "chat.completion", "created": 0, "model": "policy", "choices": [choice]}
            body = json.dumps(reply).encode()
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n")
            writer.write(b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
            await writer.drain()
            writer.close()
            return

    async def __aexit__(self, *_: object) -> None:
        self.server.close()


async def test_the_agent_corrects_itself(example, shop):
    replies = Replies(
        "SELECT title FROM items", "SELECT name FROM items WHERE price > 9", "```sql\nSELECT name FROM items\n```"
    )
    async with replies as model:
        assert await example.agent.answer(shop, model) == "SELECT name FROM items"
    first, second, third = (request["messages"] for request in replies.requests)
    assert first == [{"role": "user", "content": "shop : items\n?"}]
    assert second[-1]["content"] == "no such column: title\nitems: name price stock"
    assert third[:3] == second
    assert third[-1]["content"].startswith("no rows")


async def test_the_agent_stops_after_two_corrections(example, shop):
    replies = Replies("SELECT a FROM items", "SELECT b FROM items", "SELECT c FROM items")
    async with replies as model:
        assert await example.agent.answer(shop, model) == "SELECT c FROM items"
    assert len(replies.requests) == 3


def test_spider_and_bird_files_become_tasks(example, shop):
    name, path = "shop", Path(shop["database"])
    (path.parent / name).mkdir()
    path.rename(path.parent / name / "shop.sqlite")
    spider = [
        {"db_id": name, "question": "Which names?", "query": "SELECT name FROM items ORDER BY price"},
        {"db_id": name, "question": "Which is lost?", "query": "SELECT lost FROM items"},
        {"db_id": name, "question": "None?", "query": "SELECT name FROM items WHERE price > 99"},
    ]
    bird = [{"db_id": name, "question": "How many?", "SQL": "SELECT COUNT(*) FROM items", "evidence": "all of them"}]
    (first,), left_out = example.spider.read(spider, path.parent, "train")
    assert left_out == 2
    assert first["private"] == {"sql": "SELECT name FROM items ORDER BY price", "ordered": True}
    assert first["input"]["schema"].endswith("CREATE TABLE items (name TEXT, price REAL, stock INTEGER);")
    assert example.grade.rows_equal(first["input"], first["private"], "SELECT name FROM items ORDER BY price") == 1.0
    (second,), _ = example.spider.read(bird, path.parent, "test")
    assert second["input"]["question"] == "Question: How many?\nHint: all of them"


@pytest.mark.parametrize(
    ("sql", "ordered"),
    [
        ("SELECT a FROM t ORDER BY a", True),
        ("SELECT a FROM t WHERE b = (SELECT b FROM u ORDER BY b LIMIT 1)", False),
        ("SELECT a FROM t WHERE b IN (SELECT (c) FROM u) order  by a", True),
        ("SELECT a FROM t WHERE b = 'order by'", False),
    ],
)
def test_where_the_order_counts(example, sql, ordered):
    assert example.spider.is_ordered(sql) is ordered
