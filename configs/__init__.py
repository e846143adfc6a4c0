"""Settings of runs: one file each, with `get_config(arg)` and beside it `sweep(add)`."""
