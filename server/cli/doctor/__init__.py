"""`inferneo doctor`: what is here, what is wrong with it, and how to mend it."""
