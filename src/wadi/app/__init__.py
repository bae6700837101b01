"""The web page of ``wadi app``: generate with students, and look at runs.

`request.py` checks what a visitor sends, `models.py` loads students and teachers, `studio.py` generates, `live.py` shows a run
from its folder. None of them needs Gradio. `page.py` puts them on a page and `server.py` serves it. Start with `studio.py`.
"""
