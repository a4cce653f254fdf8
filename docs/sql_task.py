"""Writes a narrow task with a verifiable answer: questions in English, and the one SQL query that each asks for.

    python docs/sql_task.py --count 3000 --seed 1 > train.jsonl
    python docs/sql_task.py --count 200 --seed 2 > test.jsonl

One JSON object per line: prompt, answer, task (select, aggregate or group). Nothing is downloaded; the same arguments
write the same lines.
"""

import argparse
import json
import random
import sys

TABLES = {
    "employees": ("name", ["age", "salary", "office", "bonus"]),
    "orders": ("number", ["price", "weight", "customer", "discount"]),
    "books": ("title", ["pages", "year", "author", "rating"]),
    "students": ("name", ["grade", "age", "city", "score"]),
    "flights": ("code", ["distance", "delay", "airline", "seats"]),
    "products": ("label", ["price", "stock", "brand", "weight"]),
    "houses": ("address", ["rent", "rooms", "district", "size"]),
    "songs": ("title", ["length", "year", "artist", "plays"]),
}
WORDS = ["Berlin", "Rome", "Oslo", "Smith", "Meyer", "Nova", "Acme", "Delta", "Lima", "Kyoto"]
OPERATORS = {
    ">": ["over", "greater than", "more than"],
    "<": ["under", "less than", "below"],
    "=": ["equal to", "exactly"],
}
AGGREGATES = {"AVG": "average", "MAX": "highest", "MIN": "lowest", "SUM": "total"}


def condition(rng: random.Random, columns: list[str]) -> tuple[str, str]:
    """English and SQL of one comparison; the third column of a table holds text."""
    column = rng.choice(columns)
    if column == columns[2]:
        word = rng.choice(WORDS)
        return f"{column} is {word}", f"{column} = '{word}'"
    operator, number = rng.choice(list(OPERATORS)), rng.randint(1, 999)
    return f"{column} is {rng.choice(OPERATORS[operator])} {number}", f"{column} {operator} {number}"


def where(rng: random.Random, columns: list[str]) -> tuple[str, str]:
    """English and SQL of no, one or two conditions."""
    parts = [condition(rng, columns) for _ in range(rng.choice([0, 1, 1, 2]))]
    if not parts:
        return "", ""
    word = rng.choice(["and", "or"])
    english, sql = zip(*parts, strict=True)
    return f" whose {f' {word} '.join(english)}", f" WHERE {f' {word.upper()} '.join(sql)}"


def select(rng: random.Random, table: str, key: str, columns: list[str]) -> tuple[str, str]:
    """Rows, filtered, perhaps sorted and limited."""
    english, sql = where(rng, columns)
    asked, query = f"the {key} of all {table}{english}", f"SELECT {key} FROM {table}{sql}"
    if rng.random() < 0.5:
        column, falls = rng.choice(columns), rng.random() < 0.5
        asked += f", sorted by {column}{', largest first' if falls else ''}"
        query += f" ORDER BY {column}{' DESC' if falls else ''}"
    if rng.random() < 0.4:
        limit = rng.randint(1, 20)
        asked += f", at most {limit}"
        query += f" LIMIT {limit}"
    return asked, query


def aggregate(rng: random.Random, table: str, key: str, columns: list[str]) -> tuple[str, str]:
    """One number."""
    english, sql = where(rng, columns)
    if rng.random() < 0.4:
        return f"how many {table} there are{english}", f"SELECT COUNT(*) FROM {table}{sql}"
    function, column = rng.choice(list(AGGREGATES)), rng.choice([columns[0], columns[1], columns[3]])
    return (
        f"the {AGGREGATES[function]} {column} of {table}{english}",
        f"SELECT {function}({column}) FROM {table}{sql}",
    )


def group(rng: random.Random, table: str, key: str, columns: list[str]) -> tuple[str, str]:
    """One number per group."""
    english, sql = where(rng, columns)
    function, column = rng.choice(list(AGGREGATES)), rng.choice([columns[0], columns[1], columns[3]])
    asked = f"the {AGGREGATES[function]} {column} per {columns[2]} of {table}{english}"
    return asked, f"SELECT {columns[2]}, {function}({column}) FROM {table}{sql} GROUP BY {columns[2]}"


TASKS = {"select": select, "aggregate": aggregate, "group": group}


def main() -> None:
    """Write the lines."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    for _ in range(args.count):
        task = rng.choice(list(TASKS))
        table = rng.choice(list(TABLES))
        asked, query = TASKS[task](rng, table, *TABLES[table])
        line = {"prompt": f"Write an SQL query for {asked}.", "answer": f"{query};", "task": task}
        sys.stdout.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
