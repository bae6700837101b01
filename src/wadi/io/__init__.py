"""Files in and out: each format has one reader."""
