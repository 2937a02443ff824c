"""Tables and plots of README, GUIDE.md, RESULTS.md and LEADERBOARD.md, made from the JSON under `results/`."""
