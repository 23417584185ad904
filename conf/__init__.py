"""What a run is: Hydra groups, and what an option says of itself. This file lets Hydra find the YAML beside it."""
