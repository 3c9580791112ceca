"""Models: the shared core with what goes in and what comes out. Math only, no I/O."""
