"""Who does what, in which order, and what that implies."""
