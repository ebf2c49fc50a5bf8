"""log M: the mathematics, and the table that a call takes it from."""
