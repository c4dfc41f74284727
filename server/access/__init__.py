"""Who may do what, how much of it, and when: keys, their limits and use, and places."""
