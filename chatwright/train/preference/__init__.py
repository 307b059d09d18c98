"""Learning from comparisons: rankings, scalar models, measures of a reward model."""
