"""Methods side by side: a grid of trainings, run in any order by any number of processes, and what came of them."""
