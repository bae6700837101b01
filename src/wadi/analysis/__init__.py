"""What distillation changed in the weights: norm against direction, layer by layer, and hybrids that tell which of it matters.

`wadi.analysis.analyze.analyze` measures two networks, `wadi.analysis.plots` draws what it found, `wadi.analysis.swap` puts the
teacher's norms or directions back into a student.
"""
