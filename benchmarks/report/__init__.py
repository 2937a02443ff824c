"""Tables and plots of README, GUIDELINES.md, RESULTS.md and LEADERBOARD.md, made from the JSON under `results/`."""
