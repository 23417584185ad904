"""Pipeline schedules as plain data: made, checked, simulated, searched. Nothing here imports torch."""
