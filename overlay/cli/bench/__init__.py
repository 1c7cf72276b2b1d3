"""``bench`` and what it shares with the scripts in benchmarks/: engines in pairs, shapes, intervals, results.

`command` is the command, `compare` the regression gate. `outside` is what an engine's process sees of this.
"""
