"""Databases and questions with their gold SQL, all from one seed.

Four databases, each in 48 variants that differ in their rows and in the names of their columns: a column bears its main
name or, in three cases of ten, a synonym. The prompt shows the tables but not the columns, so a query often fails
at first, and the error tells the columns. Train, validation and test have variants of their own, and questions of
their own: whether a query, written with main names, belongs to train, validation or test is a matter of its hash.
"""

from __future__ import annotations

import hashlib
import os
import random
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from database import HERE, run_query

SPLITS = {"train": range(28), "validation": range(28, 36), "test": range(36, 48)}  # variants of each database
HASHES = {"train": range(50), "validation": range(50, 70), "test": range(70, 100)}  # per cent of the queries
MAIN_NAME = 0.7  # how often a column bears its main name
DRAWS = 100_000  # for one kind of question on one database
DIMENSION_ROWS, FACT_ROWS = 14, 24


@dataclass(frozen=True)
class Column:
    """`names`: how a database may call it, the main name first. `said`: how a question may call it."""

    names: tuple[str, ...]
    said: tuple[str, ...]
    values: tuple = ()  # () for a key

    @property
    def main(self) -> str:
        return self.names[0]

    @property
    def is_number(self) -> bool:
        return bool(self.values) and isinstance(self.values[0], int)

    @property
    def is_category(self) -> bool:
        return 0 < len(self.values) < 10


def column(names: str, said: str, values: str | range = "") -> Column:
    return Column(
        tuple(names.split()), tuple(said.split()), tuple(values.split() if isinstance(values, str) else values)
    )


PEOPLE = "Ada Ben Cleo Dan Eva Finn Gus Hana Ivan Jude Kara Liam Mona Nils Olga Paul Quin Rosa Sven Tara"
TITLES = "Atlas Bloom Comet Delta Ember Frost Grove Haven Indigo Jasper Karma Lotus Mirage Nova Onyx Prism"
CITIES = "Paris Rome Oslo Lima Cairo Delhi"
# The last table of each database refers to the other two.
DATABASES: dict[str, dict[str, list[Column]]] = {
    "shop": {
        "customers": [
            column("customer_id", ""),
            column("name fullname client", "name", PEOPLE),
            column("city town place", "city town", CITIES),
            column("age years", "age", range(18, 80)),
        ],
        "products": [
            column("product_id", ""),
            column("title label item", "title", TITLES),
            column("category type kind", "category type", "toys food books tools"),
            column("price cost amount", "price cost", range(5, 99)),
            column("stock supply", "stock", range(0, 60)),
        ],
        "orders": [
            column("order_id", ""),
            column("customer_id", ""),
            column("product_id", ""),
            column("status state", "status", "open paid sent"),
            column("quantity number units", "quantity", range(1, 40)),
            column("year ordered", "year", range(2000, 2025)),
        ],
    },
    "school": {
        "students": [
            column("student_id", ""),
            column("name fullname pupil", "name", PEOPLE),
            column("country nation origin", "country nation", "Spain Kenya Japan Chile India"),
            column("height size", "height", range(50, 99)),
        ],
        "courses": [
            column("course_id", ""),
            column("subject topic course", "subject", TITLES),
            column("level stage", "level", "basic medium expert"),
            column("credits points", "credits", range(1, 40)),
            column("hours length time", "hours length", range(10, 90)),
        ],
        "results": [
            column("result_id", ""),
            column("student_id", ""),
            column("course_id", ""),
            column("term season", "term season", "spring summer autumn winter"),
            column("score mark grade", "score mark", range(20, 99)),
            column("absences missed", "absences", range(0, 30)),
        ],
    },
    "clinic": {
        "patients": [
            column("patient_id", ""),
            column("name fullname person", "name", PEOPLE),
            column("city town place", "city town", CITIES),
            column("weight mass", "weight", range(40, 99)),
        ],
        "doctors": [
            column("doctor_id", ""),
            column("surname lastname doctor", "surname", TITLES),
            column("field specialty area", "field specialty", "heart skin bone eye"),
            column("salary pay wage", "salary pay", range(30, 99)),
            column("experience service", "experience", range(1, 40)),
        ],
        "visits": [
            column("visit_id", ""),
            column("patient_id", ""),
            column("doctor_id", ""),
            column("reason cause", "reason", "pain check fever"),
            column("fee cost price", "fee cost", range(10, 99)),
            column("minutes duration", "minutes duration", range(5, 60)),
        ],
    },
    "cinema": {
        "films": [
            column("film_id", ""),
            column("title film heading", "title", TITLES),
            column("genre category kind", "genre category", "drama comedy action horror"),
            column("rating score stars", "rating score", range(1, 99)),
            column("year released", "year", range(1990, 2025)),
        ],
        "members": [
            column("member_id", ""),
            column("name fullname person", "name", PEOPLE),
            column("plan tariff", "plan", "gold silver basic"),
            column("age years", "age", range(18, 80)),
        ],
        "tickets": [
            column("ticket_id", ""),
            column("film_id", ""),
            column("member_id", ""),
            column("day weekday", "day", "monday friday sunday"),
            column("seats places", "seats", range(1, 40)),
            column("price cost amount", "price cost", range(5, 99)),
        ],
    },
}


@dataclass(frozen=True)
class Kind:
    """A kind of question. SQL and wordings have the slots that `choose` fills; `condition` is what the WHERE asks."""

    name: str
    sql: str
    wordings: tuple[str, ...]
    condition: str = ""
    ordered: bool = False
    joins: bool = False


JOINED = "FROM {table} JOIN {other} USING ( {key} )"
KINDS = [
    Kind(
        "filter",
        "SELECT {show} FROM {table} WHERE {category} = {value}",
        (
            "{show} of {table} whose {category} is {value}",
            "show the {show} of all {table} with {category} {value}",
            "which {show} have the {table} of {category} {value} ?",
        ),
        "{category} = {value}",
    ),
    Kind(
        "compare",
        "SELECT {show} FROM {table} WHERE {number} {sign} {bound}",
        (
            "{show} of {table} with {number} {above} {bound}",
            "show the {show} of {table} whose {number} is {above} {bound}",
            "which {table} have a {number} {above} {bound} ? give their {show}",
        ),
        "{number} {sign} {bound}",
    ),
    Kind(
        "count",
        "SELECT COUNT ( * ) FROM {table} WHERE {category} = {value} AND {number} {sign} {bound}",
        (
            "how many {table} with {category} {value} have a {number} {above} {bound} ?",
            "number of {table} whose {category} is {value} and whose {number} is {above} {bound}",
            "count the {table} of {category} {value} with {number} {above} {bound}",
        ),
        "{category} = {value} AND {number} {sign} {bound}",
    ),
    Kind(
        "average",
        "SELECT {show} FROM {table} WHERE {category} = {value} AND {number} {sign} ( SELECT AVG ( {number} ) FROM {table} )",
        (
            "{show} of {table} with {category} {value} whose {number} is {above} the average",
            "which {table} of {category} {value} have a {number} {above} average ? show the {show}",
            "show the {show} of {table} {above} the average {number} and with {category} {value}",
        ),
        "{category} = {value} AND {number} {sign} ( SELECT AVG ( {number} ) FROM {table} )",
    ),
    Kind(
        "order",
        "SELECT {show} FROM {table} WHERE {number} {sign} {bound} ORDER BY {number} {order}",
        (
            "{show} of {table} with {number} {above} {bound} in {falling} order of {number}",
            "list the {show} of {table} whose {number} is {above} {bound} , {most} {number} first",
            "sort the {table} with {number} {above} {bound} by {falling} {number} and show their {show}",
        ),
        "{number} {sign} {bound}",
        ordered=True,
    ),
    Kind(
        "top",
        "SELECT {show} FROM {table} ORDER BY {number} {order} LIMIT {few}",
        (
            "{show} of the {few} {table} with the {most} {number}",
            "which {few} {table} have the {most} {number} ? show their {show} in {falling} order",
            "the {few} {table} of {most} {number} : list the {show}",
        ),
        ordered=True,
    ),
    Kind(
        "group",
        "SELECT {category} , COUNT ( * ) FROM {table} WHERE {number} {sign} {bound} GROUP BY {category}",
        (
            "number of {table} with {number} {above} {bound} for each {category}",
            "for each {category} count the {table} whose {number} is {above} {bound}",
            "how many {table} have a {number} {above} {bound} , by {category} ?",
        ),
        "{number} {sign} {bound}",
    ),
    Kind(
        "total",
        "SELECT {category} , {function} ( {number} ) FROM {table} GROUP BY {category}",
        (
            "{total} {number} of {table} for each {category}",
            "for each {category} show the {total} {number} of its {table}",
            "what is the {total} {number} of the {table} by {category} ?",
        ),
    ),
    Kind(
        "join",
        "SELECT {number} " + JOINED + " WHERE {other_category} = {other_value}",
        (
            "{number} of the {table} of {other} whose {other_category} is {other_value}",
            "show the {number} of {table} that belong to {other} with {other_category} {other_value}",
            "for {other} of {other_category} {other_value} list the {number} of their {table}",
        ),
        "{other_category} = {other_value}",
        joins=True,
    ),
    Kind(
        "join total",
        "SELECT {other_category} , {function} ( {number} ) " + JOINED + " GROUP BY {other_category}",
        (
            "{total} {number} of {table} for each {other_category} of the {other}",
            "for each {other_category} of {other} show the {total} {number} of their {table}",
            "what is the {total} {number} of {table} by {other_category} of {other} ?",
        ),
        joins=True,
    ),
]
SIGNS = [(">", "above"), ("<", "below")]
ORDERS = [("DESC", "highest", "falling"), ("ASC", "lowest", "rising")]
FUNCTIONS = [("AVG", "average"), ("SUM", "total"), ("MAX", "highest"), ("MIN", "lowest")]


def variant_names(database: str, variant: int) -> dict[tuple[str, str], str]:
    """(table, main name) -> name, in this variant of the database. No two columns but keys share a name."""
    dice = random.Random(f"names {database} {variant}")
    taken: set[str] = set()
    names = {}
    for table, columns in DATABASES[database].items():
        for column in columns:
            name = column.main
            if column.values:
                free = [other for other in column.names if other not in taken]
                name = free[0] if dice.random() < MAIN_NAME or len(free) == 1 else dice.choice(free[1:])
                taken.add(name)
            names[table, column.main] = name
    return names


def write_database(database: str, variant: int, path: Path) -> None:
    """Make the SQLite file of one variant; what stands at `path` is replaced at once, so that a reader sees either."""
    dice = random.Random(f"rows {database} {variant}")
    names = variant_names(database, variant)
    unfinished = path.with_suffix(f".{os.getpid()}")
    connection = sqlite3.connect(unfinished)
    for table, columns in DATABASES[database].items():
        is_fact = table == list(DATABASES[database])[-1]
        count = FACT_ROWS if is_fact else DIMENSION_ROWS
        cells = []
        for place, column in enumerate(columns):
            if not column.values:
                keys = range(1, count + 1)
                cells.append(list(keys) if place == 0 else dice.choices(range(1, DIMENSION_ROWS + 1), k=count))
            elif len(column.values) >= count:  # no value twice: an order by it has no ties
                cells.append(dice.sample(column.values, count))
            else:
                cells.append(dice.choices(column.values, k=count))
        types = ["TEXT" if column.values and not column.is_number else "INTEGER" for column in columns]
        declared = [f"{names[table, column.main]} {type_}" for column, type_ in zip(columns, types, strict=True)]
        connection.execute(f"CREATE TABLE {table} ({', '.join(declared)})")
        marks = ", ".join("?" * len(columns))
        connection.executemany(f"INSERT INTO {table} VALUES ({marks})", zip(*cells, strict=True))
    connection.commit()
    connection.close()
    unfinished.replace(path)


def choose(kind: Kind, database: str, dice: random.Random) -> dict[str, Any]:
    """What stands in each slot of the kind, drawn at random: a word, a number, or a (table, Column)."""
    tables = DATABASES[database]
    *dimensions, fact = tables
    table = fact if kind.joins else dice.choice(list(tables))
    other = dice.choice(dimensions)
    numbers = [column for column in tables[table] if column.is_number]
    number = dice.choice(numbers)
    shown = [column for column in numbers if column is not number] if table == fact else tables[table][1:2]
    category, other_category = (
        dice.choice([column for column in tables[name] if column.is_category]) for name in (table, other)
    )
    sign, above = dice.choice(SIGNS)
    order, most, falling = dice.choice(ORDERS)
    function, total = dice.choice(FUNCTIONS)
    return {
        "table": table,
        "other": other,
        "key": tables[other][0].main,
        "show": (table, dice.choice(shown)),
        "number": (table, number),
        "category": (table, category),
        "other_category": (other, other_category),
        "value": f"'{dice.choice(category.values)}'",
        "other_value": f"'{dice.choice(other_category.values)}'",
        "bound": dice.choice(number.values),
        "few": dice.randint(2, 6),
        "sign": sign,
        "above": above,
        "order": order,
        "most": most,
        "falling": falling,
        "function": function,
        "total": total,
    }


def fill(text: str, slots: dict[str, Any], name_of: Any) -> str:
    """`text` with its slots filled; `name_of(table, column)` gives a column's name."""
    return text.format(**{slot: name_of(*held) if isinstance(held, tuple) else held for slot, held in slots.items()})


def split_of(database: str, main_sql: str) -> str:
    """The split a query belongs to, by the hash of the query with main names."""
    share = int.from_bytes(hashlib.sha256(f"{database} {main_sql}".encode()).digest()[:4], "big") % 100
    return next(name for name, shares in HASHES.items() if share in shares)


def database_file(database: str, variant: int) -> str:
    return f"data/databases/{database}-{variant:02}.sqlite"


def write_databases() -> None:
    (HERE / "data/databases").mkdir(parents=True, exist_ok=True)
    for database in DATABASES:
        for variant in range(max(SPLITS["test"]) + 1):
            write_database(database, variant, HERE / database_file(database, variant))


def make_tasks(split: str, each: int) -> list[dict[str, Any]]:
    """`each` tasks for each kind of question and database, in a random order; within a variant no gold query twice.

    `private` has the gold SQL, whether the order of rows counts, the kind, and `guess`: the gold SQL with main names,
    which is the best that one who has not seen the columns can write. Needs the databases on disk. Raises ValueError
    where there are not `each` different ones.
    """
    dice = random.Random(f"tasks {split}")
    tasks: list[dict[str, Any]] = []
    seen = set()
    for database in DATABASES:
        names = {variant: variant_names(database, variant) for variant in SPLITS[split]}
        for kind in KINDS:
            wanted = len(tasks) + each
            for _ in range(DRAWS):
                if len(tasks) == wanted:
                    break
                variant = dice.choice(SPLITS[split])
                slots = choose(kind, database, dice)
                guess = fill(kind.sql, slots, lambda _, column: column.main)
                sql = fill(kind.sql, slots, lambda table, column: names[variant][table, column.main])
                wording = fill(dice.choice(kind.wordings), slots, lambda _, column: dice.choice(column.said))
                condition = fill(kind.condition, slots, lambda table, column: names[variant][table, column.main])
                path = database_file(database, variant)
                if (
                    split_of(database, guess) != split
                    or (path, sql) in seen
                    or not says_something(path, sql, condition)
                ):
                    continue
                seen.add((path, sql))
                schema = f"{database} : {' '.join(DATABASES[database])}"
                tasks.append(
                    {
                        "id": f"{split}-{len(tasks)}",
                        "input": {"database": path, "schema": schema, "question": wording},
                        "private": {"sql": sql, "ordered": kind.ordered, "kind": kind.name, "guess": guess},
                    }
                )
            else:
                raise ValueError(
                    f"{split}: not {each} different questions of kind {kind.name!r} on {database}; ask for fewer"
                )
    dice.shuffle(tasks)
    return tasks


def says_something(database: str, sql: str, condition: str) -> bool:
    """Whether the query gives rows, other than all zero, and its condition leaves some rows out."""
    rows = run_query(database, sql)
    if not rows or rows == [(0,)]:
        return False
    return not condition or rows != run_query(database, sql.replace(f"WHERE {condition}", ""))
