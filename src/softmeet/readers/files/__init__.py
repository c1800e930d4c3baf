"""The user's own files as a member: which are read, their index, and what follows a text in them."""
