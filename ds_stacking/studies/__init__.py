"""Studies of many runs, each whole in its folder: what is run, how it is run, statistics, report."""
