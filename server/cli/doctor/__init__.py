"""`inferneo doctor`: what is here, what is wrong with it, and how to fix it."""
