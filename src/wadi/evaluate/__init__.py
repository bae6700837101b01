"""How good are pictures? Protocols, drawing by them, metrics with their spread, and results that know what they may be
compared with. docs/evaluation.md tells it from the user's side."""
