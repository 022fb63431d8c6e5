"""What the scripts share: a run from a config file to its results, and a room for every task."""
