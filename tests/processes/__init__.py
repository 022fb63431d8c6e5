"""Programs that tests start: by a fork of a process that has imported what they import, and with limits on progress."""
