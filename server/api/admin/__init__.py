"""Keys and usage, for their holders and for administrators."""
