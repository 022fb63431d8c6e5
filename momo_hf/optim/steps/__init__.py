"""The kinds of step: each a passes' mathematics (`modelled`, `averaged`, `ramp`) beside its scalar side."""
