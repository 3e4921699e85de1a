"""Asks an engine for calls and time of each function in a Parquet file.

Arguments: the engine (duckdb, chdb or spark), the file. Prints {"functions": {name: {"calls", "sum_ns", "self_ns"}}}.
"""

import json
import sys

engine, path = sys.argv[1:]
QUERY = """
    SELECT function, count(*) AS calls, coalesce(sum(duration_ns), 0) AS sum_ns, coalesce(sum(self_ns), 0) AS self_ns
    FROM {table} GROUP BY function
"""

if engine == "duckdb":
    import duckdb

    rows = duckdb.sql(QUERY.format(table=f"read_parquet('{path}')")).fetchall()
elif engine == "chdb":
    import chdb

    answer = chdb.query(QUERY.format(table=f"file('{path}', Parquet)"), "JSONCompact")
    rows = json.loads(str(answer))["data"]
elif engine == "spark":
    from pyspark.sql import SparkSession

    session = SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false").getOrCreate()
    session.read.parquet(path).createOrReplaceTempView("calls")
    rows = [tuple(row) for row in session.sql(QUERY.format(table="calls")).collect()]
    session.stop()
else:
    sys.exit(f"unknown engine {engine}")

functions = {name: {"calls": int(calls), "sum_ns": int(sum_ns), "self_ns": int(own)} for name, calls, sum_ns, own in rows}
print(json.dumps({"functions": functions}))
