"""Tasks that need relational reasoning, models of equal size to learn them with, and the loop that trains them."""
