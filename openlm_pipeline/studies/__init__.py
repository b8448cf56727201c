"""Studies: many small runs, the scaling laws that are fitted to them, and what these predict of a large one."""
