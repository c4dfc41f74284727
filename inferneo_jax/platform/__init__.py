"""The machine: its memory, processors and disk, and a watchdog over threads."""
