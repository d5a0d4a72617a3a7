"""Many requests at once on one model: `engine` draws their tokens, `http` serves them over HTTP."""
