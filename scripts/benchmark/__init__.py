"""The benchmark of `scripts/bench`: align and TRL side by side, in alternating fresh processes."""
