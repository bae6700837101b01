"""Studies: a grid of runs over settings and seeds, each trained, evaluated and analysed, and one table of all results.

`file.py` reads a study, `cells.py` expands it into runs, `jobs.py` runs one of them, `engines.py` runs them all, and
`collect.py`, `summary.py` and `report.py` put the results together.
"""
