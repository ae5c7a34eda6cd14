"""One run from start to end, over whatever is lost on the way."""
