"""Plain modules, ignorant of ranks."""
