"""Hand images of the store out."""
