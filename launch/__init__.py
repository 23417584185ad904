"""How processes come to life; the only room that knows Hydra and the workers' environment."""
