"""Methods of others as their published code has them, with all that it does differently from their papers."""
