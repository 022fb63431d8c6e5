"""Data for the scripts: from the Hub, from a local folder, or an embedded demo. One file a task."""
