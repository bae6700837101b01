"""``report.html`` of a run: one page that contains everything it shows, so that it can be sent to others.

Start with `page.py`, which puts the page together. `curves.py` plots the statistics, `results.py` shows what ``wadi eval`` and
``wadi analyze`` wrote into the run's folder.
"""
