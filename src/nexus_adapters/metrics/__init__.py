"""Pure functions from arrays to numbers, and how sure those numbers are. They know nothing of the package."""
