"""Numbers about sets of images: pure functions on features and pixels, float64 where it matters."""
