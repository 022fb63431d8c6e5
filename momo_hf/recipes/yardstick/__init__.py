"""The yardstick: optimizers beside the best AdamW, by held-out loss, on small tasks of many kinds.

A task is a file of `tasks`, or anybody's with the same functions (see `task`); a rival is a row of
configs/yardstick.yaml (see `rivals`). A run is found again as long as its task, its row, and the code of both are the
same (see `source`).
"""
