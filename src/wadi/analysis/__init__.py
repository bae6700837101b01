"""Analysis of the weights that distillation changed: norm against direction by layer, and hybrids of teacher and student.

`analyze.py` compares two networks, `plots.py` and `write.py` turn the result into figures and files, and `swap.py` puts the
teacher's norms or directions back into a student. Start with `analyze.py`.
"""
