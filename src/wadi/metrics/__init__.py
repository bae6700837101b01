"""Numbers about sets of images: pure functions on features and pixels, float64 where it matters.

`features` and `clip` turn images into features, `resize` says how they are resized before, `cache` remembers the result;
`frechet`, `kernel`, `neighbours`, `diversity`, `clip` and `preference` turn these into numbers, `spread` into their spread,
and `speed` times what drew the images. Importing this package imports none of them.
"""
