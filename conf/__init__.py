"""What a run is: Hydra groups. This file only lets Hydra find the YAML beside it in an editable install."""
