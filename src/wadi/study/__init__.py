"""Studies: a grid of runs over settings and seeds, each trained, evaluated and analysed, and one table of all results.

Start with `run.py`. `file.py` reads a study, `cells.py` expands it, `jobs.py` runs one of its runs and `engines.py` or
`ray_engine.py` all of them. `plan.py` measures their length, `tune.py` chooses a setting by trials, and `collect.py`,
`summary.py` and `report.py` put the results together.
"""
