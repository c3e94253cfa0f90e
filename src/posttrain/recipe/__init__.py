"""What a run is: `schema` (the keys), `load` (a file to a Recipe), `explain` (what a key means)."""
