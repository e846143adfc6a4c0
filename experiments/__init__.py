"""Studies: each folder asks one question, and its run.py measures, prints and checks the answer."""
