"""The engine: texts that are written, who reads them, what the rule makes of it, and what is drafted ahead."""
