"""Many requests at once on one model: `Engine` draws their tokens, `server` speaks HTTP for it."""
