"""What a stage, and a run, has done: pages for people, comparisons."""
