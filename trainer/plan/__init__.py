"""What a run will hold and how long it will take, before anything of it is started: pure functions of its configuration."""
