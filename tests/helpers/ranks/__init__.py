"""Ranks and other processes: the pool, jobs under a launcher, what runs inside them and how they are watched."""
