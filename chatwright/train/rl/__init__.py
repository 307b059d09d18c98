"""What learns from sampled completions: rollouts, models, guards, the loop of iterations."""
