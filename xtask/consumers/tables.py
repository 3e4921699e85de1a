"""Asks an engine for calls and time of each function in a Parquet file, or by the documented query in a data set.

Arguments: the engine (duckdb, chdb or spark), the file, or a folder that `calls` is in, and then the document. Prints {"functions": {name: {"calls", "sum_ns",
"self_ns"}}, "errors": []}. Of a data set, functions are those of the host `web-1`, and what is wrong with the others is an error.
"""

import json
import os
import sys

engine, path, *document = sys.argv[1:]
BEGIN = {"duckdb": "-- DuckDB\n", "chdb": "-- ClickHouse and chDB\n", "spark": "-- Spark, after "}
QUERY = """
    SELECT function, count(*) AS calls, coalesce(sum(duration_ns), 0) AS sum_ns, coalesce(sum(self_ns), 0) AS self_ns
    FROM {table} GROUP BY function
"""


def documented():
    """The engine's query of a data set."""
    with open(document[0]) as file:
        blocks = [part.split("```")[0] for part in file.read().split("```sql\n")[1:]]
    (block,) = [block for block in blocks if block.startswith(BEGIN[engine])]
    return block.strip().rstrip(";")


def ask_duckdb(query):
    import duckdb

    return duckdb.sql(query).fetchall()


def ask_chdb(query):
    import chdb

    return json.loads(str(chdb.query(query, "JSONCompact")))["data"]


def ask_spark(query):
    from pyspark.sql import SparkSession

    # Two workers with a process each, as in a cluster.
    builder = SparkSession.builder.master("local-cluster[2,1,1024]").config("spark.ui.enabled", "false")
    session = builder.config("spark.driver.host", "127.0.0.1").config("spark.executor.memory", "640m").getOrCreate()
    session.read.parquet("calls" if document else path).createOrReplaceTempView("calls")
    rows = [tuple(row) for row in session.sql(query).collect()]
    session.stop()
    return rows


ask = {"duckdb": ask_duckdb, "chdb": ask_chdb, "spark": ask_spark}[engine]
tables = {"duckdb": f"read_parquet('{path}')", "chdb": f"file('{path}', Parquet)", "spark": "calls"}
functions, errors = {}, []
if document:
    document = [os.path.abspath(document[0])]
    os.chdir(path)
    rows = ask(documented())
    hosts = sorted({row[0] for row in rows})
    if hosts != ["web-1", "web-2"]:
        errors.append(f"the hosts are {hosts}")
    for host, name, calls, sum_ns in rows:
        if host == "web-1":
            functions[name] = {"calls": int(calls), "sum_ns": int(sum_ns or 0)}
else:
    for name, calls, sum_ns, own in ask(QUERY.format(table=tables[engine])):
        functions[name] = {"calls": int(calls), "sum_ns": int(sum_ns), "self_ns": int(own)}
print(json.dumps({"functions": functions, "errors": errors}))
