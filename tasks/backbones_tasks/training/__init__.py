"""What trains and measures models: the tasks, losses, evaluation, callbacks, runs and sharding."""
