"""The engine: texts that are written, who reads them, what the rule makes of it, and what is drafted ahead."""

# The most tokens of a text, unless it is said otherwise: in the commands, in every answer of the server, on its page.
ANSWER_TOKENS = 1024
