"""Every setting of a run, and how it is read and checked."""
