"""Members over tokens that are read byte by byte: tokenizations of a text, and the next byte by their sum."""
